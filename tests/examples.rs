//! The deployment examples: they parse, what they refer to is there, and the program takes the configuration in them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

use oncegate::config::{Config, Flags, parse};
use oncegate::server::Address;
use oncegate::store;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ADMIN_TOKENS: &str = "operator:0123456789abcdef0123456789abcdef\n";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// The files of one directory, by their extension.
fn files(directory: &str, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(examples().join(directory)).unwrap().map(|entry| entry.unwrap().path());
    let mut found = entries.filter(|path| path.extension().is_some_and(|e| e == extension)).collect::<Vec<_>>();
    found.sort();
    assert!(!found.is_empty(), "no .{extension} in {directory}");
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(path: &Path) -> Vec<Value> {
    let text = read(path);
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    let parsed = documents.map(|document| Value::deserialize(document).map_err(|error| format!("{path:?}: {error}")));
    parsed.collect::<Result<_, _>>().unwrap()
}

/// A part that has to be there.
#[track_caller]
fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {value:#}"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no string: {value}"))
}

fn items(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.into_iter().flat_map(|list| list.as_array().expect("a list"))
}

fn keys(value: Option<&Value>) -> BTreeSet<&str> {
    value.and_then(Value::as_object).into_iter().flatten().map(|(key, _)| key.as_str()).collect()
}

fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var_os("ONCEGATE_REQUIRE_ALL").is_none(), "skipped although ONCEGATE_REQUIRE_ALL is set: {why}");
}

type Environment = Vec<(String, String)>;

/// What the program itself says of a configuration, and what it says.
#[track_caller]
fn checked(name: &str, toml: &str, environment: &Environment) -> Config {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    std::fs::write(&file, toml).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_oncegate"));
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ONCEGATE_")) {
        command.env_remove(variable);
    }
    let output = command.args(["check", "--config"]).arg(&file).envs(environment.clone()).output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    parse(name, toml, environment.clone(), &Flags::default()).unwrap_or_else(|errors| panic!("{errors}"))
}

fn is_shared(config: &Config) -> bool {
    matches!(config.store, store::Options::Redis(_) | store::Options::Postgres(_))
}

/// Where a shared store is.
fn store_host(config: &Config) -> Option<String> {
    let (store::Options::Redis(options) | store::Options::Postgres(options)) = &config.store else { return None };
    let place = options.place();
    let authority = place.split_once("://").unwrap().1.split('/').next().unwrap();
    Some(authority.rsplit_once(':').map_or(authority, |(host, _)| host).to_owned())
}

fn time_to_stop(config: &Config) -> Duration {
    config.server.drain_delay + config.server.drain_timeout
}

fn port(address: &Address) -> u64 {
    let Address::Tcp(address) = address else { panic!("{address} has no port") };
    address.rsplit_once(':').unwrap().1.parse().unwrap()
}

/// The values of a Compose file as Compose fills them in: `${NAME:?message}`, of a secret that has to be set.
fn interpolated(value: &str) -> String {
    let Some((before, rest)) = value.split_once("${") else { return value.to_owned() };
    let (variable, after) = rest.split_once('}').expect("it ends");
    let (name, message) = variable.split_once(":?").expect("without the variable it must not start");
    assert!(name == "STORE_PASSWORD" && !message.is_empty(), "{variable}");
    format!("{before}5ec3e7{}", interpolated(after))
}

fn seconds(duration: &Value) -> Duration {
    Duration::from_secs(text(duration).strip_suffix('s').expect("seconds").parse().unwrap())
}

/// The configuration that the image itself brings.
fn of_the_image() -> String {
    let dockerfile = read(&examples().join("../Dockerfile"));
    let begins = dockerfile.split_once("/etc/oncegate/config.toml\n").expect("it is written there").1;
    begins.split_once("\nTOML\n").expect("it ends").0.to_owned()
}

const SERVICE_KEYS: [&str; 17] = [
    "build",
    "cap_drop",
    "command",
    "depends_on",
    "deploy",
    "environment",
    "healthcheck",
    "image",
    "network_mode",
    "networks",
    "ports",
    "read_only",
    "restart",
    "security_opt",
    "stop_grace_period",
    "ulimits",
    "user",
];

#[test]
fn compose_files_refer_to_what_is_there() {
    for path in files("compose", "yaml") {
        let [file] = &yaml(&path)[..] else { panic!("{path:?}: one document") };
        let known = BTreeSet::from(["networks", "services", "volumes"]);
        assert!(keys(Some(file)).is_subset(&known), "{path:?}: {:?}", keys(Some(file)));
        let services = file["services"].as_object().unwrap();
        let (networks, volumes) = (keys(file.get("networks")), keys(file.get("volumes")));
        let mut used = BTreeSet::new();
        for (name, service) in services {
            let place = format!("{}: {name}", path.display());
            let unknown = keys(Some(service));
            let unknown = unknown.iter().filter(|key| **key != "volumes" && !SERVICE_KEYS.contains(key));
            assert_eq!(unknown.collect::<Vec<_>>(), Vec::<&&str>::new(), "{place}");
            assert_ne!(service.get("image").is_some(), service.get("build").is_some(), "{place}");
            match service.get("build") {
                Some(build) => assert!(examples().join("compose").join(text(build)).join("Dockerfile").is_file()),
                None => assert!(text(&service["image"]).contains(':'), "{place}: a version"),
            }
            for network in items(service.get("networks")) {
                assert!(networks.contains(text(network)), "{place}: {network}");
                used.insert(text(network));
            }
            for volume in items(service.get("volumes")) {
                let source = text(volume).split(':').next().unwrap();
                if source.starts_with('.') {
                    assert!(examples().join("compose").join(source).is_file(), "{place}: {source}");
                    assert!(text(volume).ends_with(":ro"), "{place}: {volume}");
                } else {
                    assert!(volumes.contains(source), "{place}: {source}");
                    used.insert(source);
                }
            }
            for (other, condition) in service.get("depends_on").and_then(Value::as_object).into_iter().flatten() {
                let other = services.get(other).unwrap_or_else(|| panic!("{place} depends on {other}"));
                let tells = other.get("healthcheck").is_some() || other.get("build").is_some();
                let healthy = condition["condition"] == "service_healthy";
                assert!(condition["condition"] == "service_started" || healthy && tells, "{place}: {condition}");
            }
        }
        assert_eq!(used, networks.union(&volumes).copied().collect(), "{path:?}: nothing stands there unused");
    }
}

#[test]
fn gateways_in_compose_files_are_configured_for_what_is_around_them() {
    let mut mounted = BTreeSet::new();
    for path in files("compose", "yaml") {
        let file = yaml(&path).remove(0);
        let name = path.display().to_string();
        let gateway = &file["services"]["oncegate"];
        let mount =
            items(gateway.get("volumes")).map(text).find_map(|it| it.strip_suffix(":/etc/oncegate/config.toml:ro"));
        let toml = mount.map_or_else(of_the_image, |source| {
            mounted.insert(examples().join("compose").join(source.trim_start_matches("./")));
            read(&examples().join("compose").join(source))
        });
        let variables = gateway.get("environment").and_then(Value::as_object).into_iter().flatten();
        let variables = variables.map(|(name, value)| (name.clone(), interpolated(text(value)))).collect();
        let config = checked(&name, &toml, &variables);
        assert!(seconds(&gateway["stop_grace_period"]) > time_to_stop(&config) + Duration::from_secs(5), "{name}");
        assert_eq!(port(&config.server.listen[0]), 8080, "{name}: the published one");

        let in_networks = |service: &str| items(file["services"][service].get("networks")).collect::<Vec<_>>();
        let reaches = |service: &str| {
            let networks = in_networks(service);
            !networks.is_empty() && networks.iter().any(|network| in_networks("oncegate").contains(network))
        };
        let upstream = config.gateway.upstream.authority.to_str().unwrap().to_owned();
        match gateway.get("network_mode") {
            Some(_) => assert!(upstream.starts_with("127.0.0.1:"), "{name}: {upstream}"),
            None => assert!(reaches(upstream.split(':').next().unwrap()), "{name}: {upstream}"),
        }
        let replicas = gateway.pointer("/deploy/replicas").map_or(1, |replicas| replicas.as_u64().unwrap());
        let Some(host) = store_host(&config) else {
            assert_eq!(replicas, 1, "{name}: an embedded store serves one gateway");
            assert!(items(gateway.get("volumes")).any(|volume| text(volume) == "oncegate-data:/data"), "{name}");
            let store::Options::Embedded(options) = &config.store else { panic!("{name}: {:?}", config.store) };
            assert_eq!(options.path, Path::new("/data"), "{name}");
            continue;
        };
        assert!(replicas > 1 && reaches(&host) && reaches("balancer"), "{name}");
        assert!(!in_networks("balancer").iter().any(|network| in_networks(&host).contains(network)), "{name}");
        assert_eq!(at(&file["networks"], "/store/internal"), true, "{name}");
        assert!(items(file["services"][&host].get("volumes")).count() == 1, "{name}: the store outlives its container");
        let subnet = text(at(&file["networks"], "/gateways/ipam/config/0/subnet"));
        let trusted = config.gateway.trusted_proxies.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(trusted, [subnet], "{name}");
        // The balancer gives up after the gateways, and has room for all of them.
        let balancer = read(&examples().join("compose/haproxy.cfg"));
        let setting =
            |key: &str| balancer.lines().find_map(|line| line.trim().strip_prefix(key)).expect("it is set").trim();
        let patience = config.gateway.routes.iter().map(|route| route.wait_timeout).max().unwrap()
            + config.gateway.upstream.response_timeout;
        assert!(seconds(&setting("timeout server").into()) > patience, "{name}");
        let template = setting("server-template gateway").split(' ').collect::<Vec<_>>();
        assert!(template[0].parse::<u64>().unwrap() >= replicas && template[1] == "oncegate:8080", "{template:?}");
    }
    let all = files("compose", "toml").into_iter().collect::<BTreeSet<_>>();
    assert_eq!(mounted, all, "each is some file's");
}

/// Both gateways of the posting example run on one machine, and on the paths that its API and its worker use.
#[test]
fn gateways_of_the_posting_example_stand_side_by_side() {
    let mut taken = BTreeSet::new();
    for path in files("posting", "toml") {
        let name = path.display().to_string();
        let config = checked(&name, &read(&path), &Environment::new());
        for address in [&config.server.listen[0], &config.admin.listen] {
            assert!(taken.insert(port(address).to_string()), "{name}: {address} is the other's");
        }
        let store::Options::Embedded(options) = &config.store else { panic!("{name}: {:?}", config.store) };
        assert!(taken.insert(options.path.display().to_string()), "{name}: {:?} is the other's", options.path);
    }
    let source = |name: &str| read(&examples().join("posting/src").join(name));
    let routes = |name: &str| {
        let toml = read(&examples().join("posting").join(name));
        let paths =
            toml.lines().filter_map(|line| line.strip_prefix("path = \"/")?.split('"').next().map(str::to_owned));
        paths.map(|path| format!("/{path}")).collect::<Vec<_>>()
    };
    let [posts] = &routes("edge.toml")[..] else { panic!("one route") };
    assert!(source("api.mjs").contains(&format!("'{}'", posts.replace("{workspace}", ":workspace"))), "{posts}");
    let networks = routes("egress.toml");
    assert_eq!(networks.len(), 2);
    for route in networks {
        assert!(source("publish.mjs").contains(&format!("'{route}'")), "{route}");
    }
}

#[test]
fn haproxy_takes_the_balancers_configuration() {
    let Ok(output) = Command::new("haproxy").args(["-c", "-f"]).arg(examples().join("compose/haproxy.cfg")).output()
    else {
        return skip("haproxy is not installed");
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("WARNING"), "{said}");
}

/// A process that ends with its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts Redis with the very arguments of the example, and asks it how safe it is.
#[test]
fn redis_in_the_compose_file_loses_nothing_that_it_has_acknowledged() {
    let file = yaml(&examples().join("compose/fleet-redis.yaml")).remove(0);
    let command = items(at(&file, "/services/redis").get("command")).map(|word| interpolated(text(word)));
    let command = command.collect::<Vec<_>>();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let started = Command::new(&command[0])
        .args(&command[1..])
        .args(["--port", "0", "--unixsocket", socket.to_str().unwrap(), "--dir", dir.path().to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut server) = started.map(Killed) else { return skip("redis-server is not installed") };
    let deadline = Instant::now() + Duration::from_secs(20);
    let stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline && server.0.try_wait().unwrap().is_none(), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    (&stream).write_all(b"PING\r\nAUTH 5ec3e7\r\n").unwrap();
    assert!(next().starts_with("-NOAUTH") && next() == "+OK");
    for (setting, value) in [("appendonly", "yes"), ("appendfsync", "always"), ("maxmemory-policy", "noeviction")] {
        (&stream).write_all(format!("CONFIG GET {setting}\r\n").as_bytes()).unwrap();
        let answer = [next(), next(), next(), next(), next()];
        assert_eq!((answer[2].as_str(), answer[4].as_str()), (setting, value));
    }
}

/// The value in a command that a comment of the file gives.
fn from_literal(file: &str, key: &str) -> Option<String> {
    let value = file.split_once(&format!("--from-literal={key}='"))?.1;
    Some(value.split_once('\'').expect("it ends").0.to_owned())
}

#[test]
fn kubernetes_manifests_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = dir.path().join("tokens");
    std::fs::write(&tokens, ADMIN_TOKENS).unwrap();
    for path in files("kubernetes", "yaml") {
        let name = path.display().to_string();
        let objects = yaml(&path);
        for object in &objects {
            let version = match text(&object["kind"]) {
                "ConfigMap" | "Service" => "v1",
                "Deployment" | "StatefulSet" => "apps/v1",
                "PodDisruptionBudget" => "policy/v1",
                "NetworkPolicy" => "networking.k8s.io/v1",
                other => panic!("{name}: {other}"),
            };
            assert_eq!(object["apiVersion"], version, "{name}");
            assert!(object["metadata"]["name"].is_string(), "{name}");
        }
        let of = |kind: &str| objects.iter().find(|object| object["kind"] == kind);
        let (config_map, service) = (of("ConfigMap").unwrap(), of("Service").unwrap());
        let workload = of("Deployment").or(of("StatefulSet")).unwrap();
        let (pod, labels) = (at(workload, "/spec/template/spec"), at(workload, "/spec/template/metadata/labels"));
        let containers = items(pod.get("initContainers")).chain(items(pod.get("containers"))).collect::<Vec<_>>();
        let gateway = containers.iter().find(|container| container["name"] == "oncegate").unwrap();

        // Whoever selects pods selects these.
        assert_eq!(&workload["spec"]["selector"]["matchLabels"], labels, "{name}");
        assert_eq!(&service["spec"]["selector"], labels, "{name}");
        if let Some(budget) = of("PodDisruptionBudget") {
            assert_eq!(&budget["spec"]["selector"]["matchLabels"], labels, "{name}");
        }
        for constraint in items(pod.get("topologySpreadConstraints")) {
            assert_eq!(&constraint["labelSelector"]["matchLabels"], labels, "{name}");
        }
        if let Some(policy) = of("NetworkPolicy") {
            assert_eq!(at(policy, "/spec/ingress/0/from/0/podSelector/matchLabels"), labels, "{name}");
        }

        // Volumes, ports and probes by their names.
        let claims = items(workload["spec"].get("volumeClaimTemplates")).map(|claim| &claim["metadata"]["name"]);
        let claims = claims.collect::<Vec<_>>();
        let volumes = items(pod.get("volumes")).map(|volume| &volume["name"]).chain(claims.iter().copied());
        let volumes = volumes.collect::<Vec<_>>();
        let mounts = items(gateway.get("volumeMounts")).collect::<Vec<_>>();
        assert!(mounts.iter().all(|mount| volumes.contains(&&mount["name"])), "{name}: {mounts:?}");
        assert_eq!(mounts.len(), volumes.len(), "{name}: nothing stands there unused");
        let mounted = |path: &Path| mounts.iter().find(|mount| path.starts_with(text(&mount["mountPath"])));
        let ports = items(gateway.get("ports")).collect::<Vec<_>>();
        let numbered =
            |name: &Value| ports.iter().find(|port| port["name"] == *name).map(|port| &port["containerPort"]);
        let probes = ["startupProbe", "livenessProbe", "readinessProbe"];
        for (probe, path) in probes.iter().zip(["/livez", "/livez", "/readyz"]) {
            let asked = at(gateway, &format!("/{probe}/httpGet"));
            assert!(asked["path"] == path && asked["port"] == "admin", "{name}: {asked}");
        }

        // What the program makes of the configuration, with what the pod puts into its environment.
        let toml = text(at(config_map, "/data/config.toml"));
        assert!(
            mounted(Path::new("/etc/oncegate/config.toml")).is_some_and(|mount| mount["name"] == "config"),
            "{name}"
        );
        let volume = items(pod.get("volumes")).find(|volume| volume["name"] == "config").unwrap();
        assert_eq!(volume["configMap"]["name"], config_map["metadata"]["name"], "{name}");
        assert!(gateway["args"] == serde_json::json!(["serve", "--config", "/etc/oncegate/config.toml"]), "{name}");
        let variables = items(gateway.get("env")).map(|variable| {
            let secret = text(at(variable, "/valueFrom/secretKeyRef/key"));
            let value = from_literal(&read(&path), secret).unwrap_or_else(|| panic!("{name}: how is {secret} made?"));
            (text(&variable["name"]).to_owned(), value)
        });
        let mut variables = variables.collect::<Environment>();
        let token_file = toml.lines().find_map(|line| line.strip_prefix("token_file = \"")?.split('"').next()).unwrap();
        assert!(mounted(Path::new(token_file)).is_some_and(|mount| mount["name"] == "admin"), "{name}: {token_file}");
        variables.push(("ONCEGATE_ADMIN__TOKEN_FILE".to_owned(), tokens.display().to_string()));
        let config = checked(&name, toml, &variables);
        assert_eq!(numbered(&"gateway".into()), Some(&port(&config.server.listen[0]).into()), "{name}");
        assert_eq!(numbered(&"admin".into()), Some(&port(&config.admin.listen).into()), "{name}");
        assert!(numbered(at(service, "/spec/ports/0/targetPort")).is_some(), "{name}");
        let grace = Duration::from_secs(pod["terminationGracePeriodSeconds"].as_u64().unwrap());
        assert!(grace > time_to_stop(&config) + Duration::from_secs(5), "{name}: {grace:?}");
        assert!(config.server.drain_delay >= Duration::from_secs(5), "{name}: while the Service takes the pod out");

        // Where the records are.
        let replicas = at(workload, "/spec/replicas").as_u64().unwrap();
        if is_shared(&config) {
            assert!(replicas > 1 && workload["kind"] == "Deployment" && claims.is_empty(), "{name}");
            assert!(of("PodDisruptionBudget").is_some(), "{name}");
        } else {
            assert!(replicas == 1 && workload["kind"] == "StatefulSet", "{name}: an embedded store serves one gateway");
            let store::Options::Embedded(options) = &config.store else { panic!("{name}: {:?}", config.store) };
            let mount = mounted(&options.path).unwrap();
            assert!(claims.contains(&&mount["name"]), "{name}: the store outlives its pod");
        }
        for container in &containers {
            let security = at(container, "/securityContext");
            assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
        }
        assert_eq!(at(pod, "/securityContext/runAsNonRoot"), true, "{name}");
    }
}

#[test]
fn systemd_drop_ins_say_what_the_program_understands() {
    let unit = read(&examples().join("systemd/oncegate.service"));
    let setting = |text: &str, key: &str| {
        let lines = text.lines().filter_map(|line| line.strip_prefix(&format!("{key}=")).map(str::to_owned));
        lines.collect::<Vec<_>>()
    };
    let credentials = tempfile::tempdir().unwrap();
    for path in files("systemd", "conf") {
        let drop_in = read(&path);
        for credential in setting(&drop_in, "LoadCredential") {
            std::fs::write(credentials.path().join(credential.split(':').next().unwrap()), "s3cret\n").unwrap();
        }
        let fill = |value: &str| value.replace("%d", credentials.path().to_str().unwrap());
        let variables = setting(&drop_in, "Environment");
        let variables = variables.iter().map(|line| line.split_once('=').expect("a value"));
        let variables = variables.map(|(name, value)| (name.to_owned(), fill(value))).collect::<Environment>();
        assert!(variables.iter().all(|(name, _)| name.starts_with("ONCEGATE_")), "{path:?}: {variables:?}");
        let config = checked(&path.display().to_string(), "", &variables);
        assert_eq!(is_shared(&config), path.ends_with("shared-store.conf"), "{path:?}");
        if let store::Options::Postgres(options) = &config.store {
            assert_eq!(options.password.as_deref(), Some("s3cret"));
            assert!(!options.url.contains("s3cret") && options.url.ends_with("sslmode=verify-full"), "{path:?}");
        }
        let stop = setting(&unit, "TimeoutStopSec");
        assert!(seconds(&stop[0].as_str().into()) > time_to_stop(&config) + Duration::from_secs(5), "{path:?}");
    }
    let socket = read(&examples().join("systemd/oncegate.socket"));
    let listen = setting(&socket, "ListenStream");
    let (host, _) = listen[0].rsplit_once(':').unwrap();
    assert!(host.parse::<IpAddr>().unwrap().is_unspecified() && !setting(&unit, "ExecStart").is_empty());
}

/// The Debian service manager's own opinion.
#[test]
fn systemd_takes_unit_and_drop_ins() {
    let dir = tempfile::tempdir().unwrap();
    let unit = read(&examples().join("systemd/oncegate.service")).replace("/usr/local/bin/oncegate", "/bin/true");
    let drop_ins = dir.path().join("oncegate.service.d");
    std::fs::create_dir(&drop_ins).unwrap();
    std::fs::write(dir.path().join("oncegate.service"), unit).unwrap();
    std::fs::copy(examples().join("systemd/shared-store.conf"), drop_ins.join("shared-store.conf")).unwrap();
    let verify = Command::new("systemd-analyze").arg("verify").arg(dir.path().join("oncegate.service")).output();
    let Ok(output) = verify else { return skip("systemd-analyze is not installed") };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn the_readme_links_to_every_example() {
    let readme = read(&examples().join("../README.md"));
    for (directory, extension) in
        [("compose", "yaml"), ("kubernetes", "yaml"), ("systemd", "conf"), ("systemd", "service")]
    {
        for path in files(directory, extension) {
            let link = format!("(examples/{directory}/{})", path.file_name().unwrap().to_str().unwrap());
            assert!(readme.contains(&link), "{link}");
        }
    }
}
