//! What must hold for any bytes, on either side.

use super::reference::{self, Asked};
use super::requests::Client;
use super::{Seen, Visit, answers};
use crate::wire::{self, Fields, Framing, Message, Parsed};
use std::collections::HashMap;

pub(crate) fn judge(clients: &[Client], seen: &Seen) -> Vec<String> {
    let mut wrong = seen.wrong.clone();
    let asked = clients.iter().enumerate().map(|(number, client)| reference::read(number, &client.bytes));
    let asked = asked.collect::<Vec<_>>();
    let all = asked.iter().flatten().collect::<Vec<_>>();
    let mut answered = vec![0; all.len()];
    // Whose request each visit is.
    let mut owners = Vec::new();
    for (number, visit) in seen.visits.iter().enumerate() {
        let owner = owner(visit, &all, &mut answered);
        match owner {
            None => wrong.push(format!("visit {number}: nobody has sent this request")),
            Some(asked) => {
                wrong.extend(fields(visit, asked).err().map(|found| format!("visit {number}: {found}")));
            }
        }
        owners.push(owner);
    }
    wrong.extend(executed_twice(&seen.visits));
    for tunnel in &seen.tunnels {
        let sent = |client: &Client| tunnel.is_empty() || client.bytes.windows(tunnel.len()).any(|part| part == tunnel);
        if !clients.iter().any(sent) {
            wrong.push(format!("nobody has sent through a tunnel: {:?}", wire::text(tunnel)));
        }
    }
    for (number, answers) in seen.answers.iter().enumerate() {
        match responses(answers, &asked[number], clients[number].bytes.len()) {
            Err(found) => wrong.push(format!("client {number}: {found}")),
            Ok(messages) => {
                let pairs = asked[number].iter().zip(&messages);
                let strange = pairs.filter_map(|(asked, message)| strange(asked, message, &seen.visits, &owners));
                wrong.extend(strange.map(|found| format!("client {number}: {found}")));
            }
        }
        wrong.extend(others(number, answers, &asked[number], &seen.visits, &owners));
    }
    wrong
}

/// The request that the upstream has seen. What is safe and has no body may be sent once more.
fn owner<'a>(visit: &Visit, all: &[&'a Asked], answered: &mut [usize]) -> Option<&'a Asked> {
    let message = &visit.message;
    let [method, target, _] = &message.start;
    let alike = |asked: &Asked| {
        let ids = asked.list("connection").iter().all(|option| option != "x-id");
        let same_id = !ids || asked.all("x-id").eq(message.all("x-id"));
        let body =
            if visit.whole { asked.whole && asked.body == message.body } else { asked.body.starts_with(&message.body) };
        asked.method == *method && asked.target.as_ref() == Some(target) && same_id && body
    };
    let safe = ["GET", "HEAD", "OPTIONS", "TRACE"].contains(&method.as_str());
    let times = if safe && message.body.is_empty() { 2 } else { 1 };
    let found = (0..times).find_map(|time| (0..all.len()).find(|at| answered[*at] == time && alike(all[*at])))?;
    answered[found] += 1;
    Some(all[found])
}

/// Fields that a proxy sets, drops or changes.
const HOP: [&str; 18] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "upgrade",
    "http2-settings",
    "transfer-encoding",
    "content-length",
    "trailer",
    "expect",
    "via",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "host",
    "max-forwards",
];

/// A request's head, as the upstream has got it.
fn fields(visit: &Visit, asked: &Asked) -> Result<(), String> {
    let message = &visit.message;
    let dropped = ["keep-alive", "proxy-connection", "proxy-authorization", "te", "http2-settings", "expect"];
    if let Some(name) = dropped.iter().find(|name| message.field(name).is_some()) {
        return Err(format!("{name} has come through"));
    }
    let upgrade = message.field("upgrade");
    let h2c = upgrade.is_some_and(|protocols| protocols.to_ascii_lowercase().contains("h2"));
    if h2c || message.field("connection") != upgrade.map(|_| "upgrade") {
        return Err("Connection or Upgrade has come through".to_owned());
    }
    let via = if asked.http10 { "1.0 oncegate" } else { "1.1 oncegate" };
    if !message.all("via").last().is_some_and(|last| last.ends_with(via)) {
        return Err("no Via".to_owned());
    }
    if asked.host.as_deref().unwrap_or("127.0.0.1:3000") != message.field("host").unwrap_or_default() {
        return Err(format!("another host than {:?}", asked.host));
    }
    let named = asked.list("connection");
    let derived = asked.all("idempotency-key").next().is_none();
    let kept = |fields: &Fields| {
        let mut kept = fields.clone();
        kept.retain(|(name, _)| {
            !(HOP.contains(&name.as_str()) || named.contains(name) || derived && name == "idempotency-key")
        });
        kept.sort_by(|one, other| one.0.cmp(&other.0));
        kept
    };
    let (expected, got) = (kept(&asked.fields), kept(&message.fields));
    if expected != got {
        return Err(format!("fields {got:?} instead of {expected:?}"));
    }
    if let Some((name, _)) =
        message.fields.iter().find(|(name, _)| named.contains(name) && !HOP.contains(&name.as_str()))
    {
        return Err(format!("{name}, which Connection names, has come through"));
    }
    let never = ["content-length", "transfer-encoding", "host", "authorization", "idempotency-key"];
    match message.trailers.iter().find(|(name, _)| never.contains(&name.as_str()) && name != "idempotency-key") {
        Some((name, _)) => Err(format!("a trailer {name}")),
        None => Ok(()),
    }
}

/// A key as RFC 9651 has it, or bare.
fn key(value: &str) -> String {
    let Some(quoted) = value.strip_prefix('"') else { return value.to_owned() };
    let mut key = String::new();
    let mut escaped = false;
    for c in quoted.chars() {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => break,
            c => {
                key.push(c);
                escaped = false;
            }
        }
    }
    key
}

/// The path of a route that the target belongs to.
fn route(target: &str) -> Option<Vec<String>> {
    let mut segments: Vec<String> = Vec::new();
    for segment in target.split('?').next()?.split('/') {
        let segment = segment.replace("%70", "p");
        match segment.as_str() {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment),
        }
    }
    let parts = segments.iter().map(String::as_str).collect::<Vec<_>>();
    matches!(parts.as_slice(), ["posts"] | ["v1", "workspaces", _, "posts"]).then_some(segments)
}

/// One tenant's key on one path gets there once, unless the upstream may have freed it.
fn executed_twice(visits: &[Visit]) -> Vec<String> {
    let mut executed = HashMap::new();
    let mut wrong = Vec::new();
    for (number, Visit { message, freed, .. }) in visits.iter().enumerate() {
        let (Some(value), Some(path)) = (message.field("idempotency-key"), route(&message.start[1])) else { continue };
        if message.start[0] != "POST" {
            continue;
        }
        let id = (message.field("authorization").map(str::to_owned), path, key(value));
        match executed.get(&id) {
            Some(first) => wrong.push(format!("visit {number} is visit {first} again: {id:?}")),
            None if *freed => {}
            None => drop(executed.insert(id, number)),
        }
    }
    wrong
}

/// Well-formed responses, none without a request; the last may be cut off.
fn responses(bytes: &[u8], asked: &[Asked], sent: usize) -> Result<Vec<Message>, String> {
    let mut rest = bytes;
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let request = asked.get(messages.len());
        let to_head = request.is_some_and(|asked| asked.method == "HEAD");
        let parse = |to_head: bool| {
            wire::response(rest, to_head, true).map_err(|wrong| format!("{wrong}: {:?}", wire::text(rest)))
        };
        let mut parsed = parse(to_head)?;
        // The library refuses what it cannot read, whatever it was.
        if to_head
            && let Ok(Parsed::Whole(message, len)) = parse(false)
            && len == rest.len()
            && message.problem().is_some()
            && message.field("connection") == Some("close")
        {
            parsed = Parsed::Whole(message, len);
        }
        let (message, len) = match parsed {
            Parsed::Whole(message, len) => (message, len),
            Parsed::Partial(message) => (message.ok_or("half a head")?, rest.len()),
        };
        rest = &rest[len..];
        match message.status() {
            101 if request.is_some_and(|asked| asked.all("upgrade").next().is_some()) => return Ok(messages),
            101 => return Err("101 to who offered nothing".to_owned()),
            100..200 => continue,
            _ => {}
        }
        response(&message, request)?;
        messages.push(message);
        let left = asked.last().is_none_or(|last| last.end < sent || !last.whole);
        if messages.len() > asked.len() + usize::from(left) {
            return Err(format!("{} answers to {} requests", messages.len(), asked.len()));
        }
    }
    Ok(messages)
}

/// Whether what is answered is what the upstream has said to another request, which had not even the same key.
fn strange(asked: &Asked, message: &Message, visits: &[Visit], owners: &[Option<&Asked>]) -> Option<String> {
    let text = format!("{:?}{}", message.fields, wire::text(&message.body));
    let found = visits.iter().zip(owners).enumerate().find(|(number, (visit, owner))| {
        let own = owner.is_some_and(|owner| {
            owner.method == asked.method && owner.target == asked.target && owner.all("x-id").eq(asked.all("x-id"))
        });
        text.contains(&answers::token(*number)) && !own && !entitled(asked, visit)
    });
    found.map(|(number, _)| format!("visit {number} is the answer to another request than {asked:?}"))
}

/// Whether it is told the record of what the upstream has seen.
fn entitled(asked: &Asked, visit: &Visit) -> bool {
    let keys = |all: Vec<&str>| all.into_iter().map(key).collect::<Vec<_>>();
    let sent = keys(asked.all("idempotency-key").collect());
    asked.method == "POST"
        && asked.all("authorization").eq(visit.message.all("authorization"))
        && (sent.is_empty() || sent == keys(visit.message.all("idempotency-key").collect()))
}

fn response(message: &Message, asked: Option<&Asked>) -> Result<(), String> {
    let dropped = ["keep-alive", "proxy-connection", "proxy-authenticate", "te", "upgrade", "x-hop"];
    if let Some(name) = dropped.iter().find(|name| message.field(name).is_some()) {
        return Err(format!("{name} has come through: {message:?}"));
    }
    if asked.is_some_and(|asked| asked.http10) && message.framing == Framing::Chunked {
        return Err(format!("chunks to HTTP/1.0: {message:?}"));
    }
    if message.field("proxy-status").is_some_and(|status| status.contains("proxy_internal_error")) {
        return Err(format!("a panic, perhaps: {message:?}"));
    }
    Ok(())
}

/// What the upstream has said to others: only who bears the same credentials, and the same key, may see it.
fn others(client: usize, answers: &[u8], asked: &[Asked], visits: &[Visit], owners: &[Option<&Asked>]) -> Vec<String> {
    let text = wire::text(answers);
    let mut wrong = Vec::new();
    for (number, (visit, owner)) in visits.iter().zip(owners).enumerate() {
        let own = owner.is_some_and(|owner| owner.client == client);
        if own || !text.contains(&answers::token(number)) {
            continue;
        }
        if !asked.iter().any(|asked| entitled(asked, visit)) {
            wrong.push(format!("client {client} gets the answer to another's request, visit {number}"));
        }
    }
    wrong
}
