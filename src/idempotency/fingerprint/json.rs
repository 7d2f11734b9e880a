//! The canonical form of a JSON text (RFC 8259), and the JSON Pointers (RFC 6901) left out of it.
//!
//! The canonical form, in which no value is the beginning of another:
//!
//! ```text
//! value  = "n" | "t" | "f" | number | string | "[" value… "]" | "{" member… "}"
//! number = the literal as it stands, END        string = DQUOTE, the decoded text, END
//! member = string value, in the order of the bytes of the names, no name twice
//! ```
//!
//! END is the byte FF, which occurs nowhere in UTF-8. Numbers are never read as numbers: their text counts, so that a
//! 64-bit id is not rounded into its neighbour.

/// Containers within containers beyond which a text is not read as JSON.
const DEPTH_MAX: usize = 128;

const END: u8 = 0xff;

/// The unescaped reference tokens of a JSON Pointer.
pub(super) type Pointer = Vec<String>;

/// What is wrong with a pointer, if anything.
pub(super) fn pointer_error(pointer: &str) -> Option<String> {
    if pointer.is_empty() {
        Some("\"\": the empty pointer names the whole body; name the members to leave out".to_owned())
    } else if !pointer.starts_with('/') {
        Some(format!("{pointer:?}: a JSON Pointer begins with \"/\"; write {:?}", format!("/{pointer}")))
    } else if parse_pointer(pointer).is_none() {
        Some(format!("{pointer:?}: in a JSON Pointer \"~\" is written \"~0\", and \"/\" within a name \"~1\""))
    } else {
        None
    }
}

/// The pointer's tokens; `None` if it is malformed or names the whole document.
pub(super) fn parse_pointer(pointer: &str) -> Option<Pointer> {
    pointer.strip_prefix('/')?.split('/').map(unescape).collect()
}

fn unescape(token: &str) -> Option<String> {
    let mut parts = token.split('~');
    let mut text = parts.next()?.to_owned();
    for part in parts {
        let (replacement, rest) = match part.strip_prefix('0') {
            Some(rest) => ('~', rest),
            None => ('/', part.strip_prefix('1')?),
        };
        text.push(replacement);
        text.push_str(rest);
    }
    Some(text)
}

/// Appends the canonical form of `body` without what `ignore` names. `None`: it is not valid JSON, nests deeper than
/// [`DEPTH_MAX`], or repeats a member name; `out` then holds the beginning of something.
pub(super) fn canonicalize(body: &[u8], ignore: &[&[String]], out: &mut Vec<u8>) -> Option<()> {
    let text = std::str::from_utf8(body).ok()?;
    let mut parser = Parser { rest: text.as_bytes(), out, members: Vec::new(), scratch: Vec::new() };
    parser.value(0, ignore)?;
    parser.skip_whitespace();
    parser.rest.is_empty().then_some(())
}

struct Parser<'a> {
    /// What has not been read yet.
    rest: &'a [u8],
    out: &'a mut Vec<u8>,
    /// The members of the objects that are open, innermost last.
    members: Vec<Member>,
    scratch: Vec<u8>,
}

/// Where a member stands in the output.
#[derive(Clone, Copy)]
struct Member {
    start: usize,
    name_end: usize,
    end: usize,
    ignored: bool,
}

impl Parser<'_> {
    fn skip_whitespace(&mut self) {
        while let [b' ' | b'\t' | b'\n' | b'\r', rest @ ..] = self.rest {
            self.rest = rest;
        }
    }

    /// Whether `byte` comes next, after whitespace; then it is read.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_whitespace();
        match self.rest {
            [next, rest @ ..] if *next == byte => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// A value within `depth` containers; `ignore` holds what is left of the pointers that lead here.
    fn value(&mut self, depth: usize, ignore: &[&[String]]) -> Option<()> {
        self.skip_whitespace();
        match self.rest {
            [b'"', ..] => self.string(),
            [b'{', rest @ ..] => {
                self.rest = rest;
                self.object(depth.checked_add(1).filter(|depth| *depth <= DEPTH_MAX)?, ignore)
            }
            [b'[', rest @ ..] => {
                self.rest = rest;
                self.array(depth.checked_add(1).filter(|depth| *depth <= DEPTH_MAX)?, ignore)
            }
            [b'-' | b'0'..=b'9', ..] => self.number(),
            [b'n', b'u', b'l', b'l', rest @ ..]
            | [b't', b'r', b'u', b'e', rest @ ..]
            | [b'f', b'a', b'l', b's', b'e', rest @ ..] => {
                self.out.extend(self.rest.first());
                self.rest = rest;
                Some(())
            }
            _ => None,
        }
    }

    fn array(&mut self, depth: usize, ignore: &[&[String]]) -> Option<()> {
        self.out.push(b'[');
        if !self.take(b']') {
            for index in 0_usize.. {
                let start = self.out.len();
                if ignore.is_empty() {
                    self.value(depth, &[])?;
                } else {
                    let ignore = step_into(ignore, index.to_string().as_bytes());
                    self.value(depth, &ignore)?;
                    if names_this(&ignore) {
                        self.out.truncate(start);
                    }
                }
                if !self.take(b',') {
                    break;
                }
            }
            self.take(b']').then_some(())?;
        }
        self.out.push(b']');
        Some(())
    }

    fn object(&mut self, depth: usize, ignore: &[&[String]]) -> Option<()> {
        self.out.push(b'{');
        let first = self.members.len();
        if !self.take(b'}') {
            loop {
                self.skip_whitespace();
                let start = self.out.len();
                self.string()?;
                let name_end = self.out.len();
                self.take(b':').then_some(())?;
                let ignored = if ignore.is_empty() {
                    self.value(depth, &[])?;
                    false
                } else {
                    // Between the quotation mark and END stands the decoded name.
                    let ignore = step_into(ignore, self.out.get(start + 1..name_end - 1)?);
                    self.value(depth, &ignore)?;
                    names_this(&ignore)
                };
                self.members.push(Member { start, name_end, end: self.out.len(), ignored });
                if !self.take(b',') {
                    break;
                }
            }
            self.take(b'}').then_some(())?;
            self.arrange(first)?;
        }
        self.out.push(b'}');
        Some(())
    }

    /// Sorts the members from `first` on, which end the output, and drops the ignored ones. `None`: a name comes twice.
    fn arrange(&mut self, first: usize) -> Option<()> {
        let out = &mut *self.out;
        let members = self.members.get_mut(first..)?;
        let begin = members.first()?.start;
        let name = |member: &Member| out.get(member.start..member.name_end);
        let in_order = members.is_sorted_by(|a, b| name(a) < name(b));
        if !in_order {
            members.sort_unstable_by(|a, b| name(a).cmp(&name(b)));
            // An ignored member counts here, too: which of two is meant is anybody's guess.
            if !members.is_sorted_by(|a, b| name(a) < name(b)) {
                return None;
            }
        }
        if !in_order || members.iter().any(|member| member.ignored) {
            self.scratch.clear();
            for member in members.iter().filter(|member| !member.ignored) {
                self.scratch.extend_from_slice(out.get(member.start..member.end)?);
            }
            out.truncate(begin);
            out.extend_from_slice(&self.scratch);
        }
        self.members.truncate(first);
        Some(())
    }

    fn string(&mut self) -> Option<()> {
        self.rest = self.rest.strip_prefix(b"\"")?;
        self.out.push(b'"');
        loop {
            let (text, rest) = self.rest.split_at_checked(plain_len(self.rest))?;
            self.out.extend_from_slice(text);
            match rest {
                [b'"', rest @ ..] => {
                    self.rest = rest;
                    self.out.push(END);
                    return Some(());
                }
                [b'\\', rest @ ..] => {
                    self.rest = rest;
                    let decoded = self.escape()?;
                    self.out.extend_from_slice(decoded.encode_utf8(&mut [0; 4]).as_bytes());
                }
                _ => return None,
            }
        }
    }

    /// What follows a backslash. A surrogate without its other half stands for no character.
    fn escape(&mut self) -> Option<char> {
        let (letter, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(match letter {
            b'"' | b'\\' | b'/' => char::from(*letter),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let unit = self.hex()?;
                if !(0xd800..0xdc00).contains(&unit) {
                    return char::from_u32(unit.into());
                }
                self.rest = self.rest.strip_prefix(b"\\u")?;
                char::decode_utf16([unit, self.hex()?]).next()?.ok()?
            }
            _ => return None,
        })
    }

    fn hex(&mut self) -> Option<u16> {
        let (digits, rest) = self.rest.split_first_chunk::<4>()?;
        self.rest = rest;
        digits.iter().try_fold(0, |unit, digit| {
            let digit = char::from(*digit).to_digit(16)?;
            Some(unit << 4 | u16::try_from(digit).ok()?)
        })
    }

    fn number(&mut self) -> Option<()> {
        let unsigned = self.rest.strip_prefix(b"-").unwrap_or(self.rest);
        let mut rest = match unsigned {
            [b'0', rest @ ..] => rest,
            _ => skip_digits(unsigned)?,
        };
        if let [b'.', fraction @ ..] = rest {
            rest = skip_digits(fraction)?;
        }
        if let [b'e' | b'E', b'+' | b'-', exponent @ ..] | [b'e' | b'E', exponent @ ..] = rest {
            rest = skip_digits(exponent)?;
        }
        let (literal, rest) = self.rest.split_at_checked(self.rest.len() - rest.len())?;
        self.out.extend_from_slice(literal);
        self.out.push(END);
        self.rest = rest;
        Some(())
    }
}

/// How many bytes stand before the next quotation mark, backslash or control character. Looks at eight bytes at once: a
/// byte of `found` has its high bit set if it is one of those, or comes after one.
fn plain_len(text: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = ONES << 7;
    let (words, tail) = text.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let below = |word: u64, limit: u8| word.wrapping_sub(ONES * u64::from(limit)) & !word;
        let quote = below(word ^ (ONES * u64::from(b'"')), 1);
        let backslash = below(word ^ (ONES * u64::from(b'\\')), 1);
        let found = (quote | backslash | below(word, b' ')) & HIGH;
        if found != 0 {
            return at * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let plain = tail.iter().take_while(|byte| !matches!(byte, b'"' | b'\\' | 0..0x20)).count();
    words.len() * 8 + plain
}

/// What comes after one digit or more.
fn skip_digits(text: &[u8]) -> Option<&[u8]> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    text.get(digits..).filter(|_| digits > 0)
}

/// What is left of the pointers that lead on to the member or element `token`.
fn step_into<'p>(ignore: &[&'p [String]], token: &[u8]) -> Vec<&'p [String]> {
    ignore
        .iter()
        .filter_map(|pointer| pointer.split_first())
        .filter(|(first, _)| first.as_bytes() == token)
        .map(|(_, rest)| rest)
        .collect()
}

fn names_this(ignore: &[&[String]]) -> bool {
    ignore.iter().any(|pointer| pointer.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain_len_byte_by_byte(text: &[u8]) -> usize {
        text.iter().take_while(|byte| **byte >= 0x20 && **byte != b'"' && **byte != b'\\').count()
    }

    #[test]
    fn every_byte_at_every_place_ends_plain_text_or_does_not() {
        for len in 0..=17 {
            for at in 0..len {
                for byte in 0..=u8::MAX {
                    let mut text = vec![b'a'; len];
                    text[at] = byte;
                    assert_eq!(plain_len(&text), plain_len_byte_by_byte(&text), "{}", text.escape_ascii());
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Bytes one bit away from those that end plain text, in all neighbourhoods.
        #[test]
        fn plain_text_ends_where_it_ends_byte_by_byte(
            text in prop::collection::vec(prop::sample::select(&b"\x00\x1f\x20\x21\x22\x23\x5b\x5c\x5d\x80\x9f\xa0\xa2\xdc\xffaaaaaaaa"[..]), 0..40),
        ) {
            prop_assert_eq!(plain_len(&text), plain_len_byte_by_byte(&text));
        }
    }
}
