//! A strict JSON pull reader over text in memory. It allocates only the strings it is asked for, each bounded, so that a
//! hostile file costs no more than its own size; it never repeats what it read in a message. serde_json builds whole trees
//! and copies offending text into its errors, and lets duplicate keys pass.

use std::borrow::Cow;

/// Nesting allowed in values that are skipped.
const MAX_DEPTH: usize = 64;

/// What is wrong, and at which byte.
#[derive(Debug, PartialEq)]
pub(super) struct Flaw {
    pub at: usize,
    pub why: Cow<'static, str>,
}

pub(super) type Parsed<T> = std::result::Result<T, Flaw>;

pub(super) struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Parsed<Reader<'a>> {
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Reader { text, at: 0 }),
            Err(e) => Err(Flaw {
                at: e.valid_up_to(),
                why: "it is not UTF-8".into(),
            }),
        }
    }

    pub(super) fn flaw<T>(&self, why: impl Into<Cow<'static, str>>) -> Parsed<T> {
        Err(Flaw {
            at: self.at,
            why: why.into(),
        })
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_white(&mut self) {
        let bytes = self.text.as_bytes();
        while bytes[self.at..].starts_with(b"        ") {
            self.at += 8;
        }
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.byte() {
            self.at += 1;
        }
    }

    /// The next byte that is not white space, left unread.
    pub(super) fn peek(&mut self) -> Option<u8> {
        self.skip_white();
        self.byte()
    }

    fn eat(&mut self, wanted: u8) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: u8) -> Parsed<()> {
        match self.eat(wanted) {
            true => Ok(()),
            false => self.flaw(format!("`{}` expected", wanted as char)),
        }
    }

    /// Only white space may follow.
    pub(super) fn end(&mut self) -> Parsed<()> {
        match self.peek() {
            None => Ok(()),
            Some(_) => self.flaw("something follows the closing brace"),
        }
    }

    /// Calls `member` at each value of an object, with its key (at most `max_key` bytes). Duplicates are the caller's.
    pub(super) fn object(
        &mut self,
        max_key: usize,
        mut member: impl FnMut(&mut Reader<'a>, Cow<'a, str>) -> Parsed<()>,
    ) -> Parsed<()> {
        self.expect(b'{')?;
        if self.eat(b'}') {
            return Ok(());
        }
        loop {
            let key = self.string(max_key)?;
            self.expect(b':')?;
            member(self, key)?;
            if !self.eat(b',') {
                return self.expect(b'}');
            }
        }
    }

    /// Calls `member` at each value of an object whose keys do not matter.
    pub(super) fn members_raw(
        &mut self,
        mut member: impl FnMut(&mut Reader<'a>) -> Parsed<()>,
    ) -> Parsed<()> {
        self.expect(b'{')?;
        if self.eat(b'}') {
            return Ok(());
        }
        loop {
            self.raw_string(usize::MAX)?;
            self.expect(b':')?;
            member(self)?;
            if !self.eat(b',') {
                return self.expect(b'}');
            }
        }
    }

    /// Calls `item` at each value of an array.
    pub(super) fn array(
        &mut self,
        mut item: impl FnMut(&mut Reader<'a>) -> Parsed<()>,
    ) -> Parsed<()> {
        self.expect(b'[')?;
        if self.eat(b']') {
            return Ok(());
        }
        loop {
            item(self)?;
            if !self.eat(b',') {
                return self.expect(b']');
            }
        }
    }

    /// At most `max` whole numbers.
    pub(super) fn numbers(&mut self, max: usize) -> Parsed<Vec<u64>> {
        let mut list = Vec::new();
        self.array(|r| {
            if list.len() == max {
                return r.flaw(format!("more than {max} numbers in a list"));
            }
            list.push(r.unsigned()?);
            Ok(())
        })?;
        Ok(list)
    }

    /// A whole number, without sign, fraction, exponent or leading zeros.
    pub(super) fn unsigned(&mut self) -> Parsed<u64> {
        self.skip_white();
        let start = self.at;
        let mut value = 0u64;
        while let Some(digit @ b'0'..=b'9') = self.byte() {
            let next = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(u64::from(digit - b'0')));
            match next {
                Some(next) => value = next,
                None => return self.flaw("a number above 2^64"),
            }
            self.at += 1;
        }
        let digits = self.at - start;
        let padded = digits > 1 && self.text.as_bytes()[start] == b'0';
        match self.byte() {
            _ if digits == 0 || padded => self.flaw("a whole number expected"),
            Some(b'.' | b'e' | b'E') => self.flaw("a whole number expected"),
            _ => Ok(value),
        }
    }

    /// A string of at most `max` bytes, escapes resolved.
    pub(super) fn string(&mut self, max: usize) -> Parsed<Cow<'a, str>> {
        // An escape is at most six bytes for one.
        let raw = self.raw_string(max.saturating_mul(6))?;
        let text = match raw.contains('\\') {
            false => Cow::Borrowed(raw),
            true => match unescape(raw) {
                Some(text) => Cow::Owned(text),
                None => return self.flaw("a broken escape in a string"),
            },
        };
        match text.len() > max {
            true => self.flaw(format!("a string of more than {max} bytes")),
            false => Ok(text),
        }
    }

    /// What lies between the quotes, escapes as they are. Looks no further than `max` bytes.
    fn raw_string(&mut self, max: usize) -> Parsed<&'a str> {
        if self.peek() != Some(b'"') {
            return self.flaw("a string expected");
        }
        let start = self.at + 1;
        let mut at = start;
        let bytes = self.text.as_bytes();
        loop {
            if at - start > max {
                return self.flaw("a string that is too long");
            }
            let end = bytes.len().min(start.saturating_add(max).saturating_add(8));
            at += plain_prefix(&bytes[at.min(end)..end]);
            match bytes.get(at) {
                Some(b'"') => break,
                // Of escapes in a row every other byte is looked at.
                Some(b'\\') => {
                    let after = &bytes[at.min(end)..end];
                    let (pairs, _) = after.as_chunks::<2>();
                    at += 2 * pairs.iter().take_while(|p| p[0] == b'\\').count().max(1);
                }
                Some(0..=0x1f) => return self.flaw("a control character in a string"),
                Some(_) => at += 1,
                None => return self.flaw("a string that does not end"),
            }
        }
        self.at = at + 1;
        Ok(&self.text[start..at])
    }

    /// Passes over any value.
    pub(super) fn skip(&mut self) -> Parsed<()> {
        self.skip_at(0)
    }

    fn skip_at(&mut self, depth: usize) -> Parsed<()> {
        if depth == MAX_DEPTH {
            return self.flaw("nested too deeply");
        }
        match self.peek() {
            Some(b'"') => self.raw_string(usize::MAX).map(|_| ()),
            Some(b'[') => self.array(|r| r.skip_at(depth + 1)),
            Some(b'{') => self.members_raw(|r| r.skip_at(depth + 1)),
            _ => self.skip_scalar(),
        }
    }

    /// A number or literal. Which of them does not matter to somebody who skips it.
    fn skip_scalar(&mut self) -> Parsed<()> {
        let rest = &self.text.as_bytes()[self.at..];
        let word = |b: &&u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.');
        let len = rest.iter().take_while(word).count();
        let number = matches!(rest.first(), Some(b'-' | b'0'..=b'9'));
        if number || matches!(&rest[..len], b"true" | b"false" | b"null") {
            self.at += len;
            Ok(())
        } else {
            self.flaw("a value expected")
        }
    }
}

/// How many of the first bytes are neither quote, backslash nor control, found 8 at a time (Hacker's Delight, "find first
/// 0-byte": a false alarm is possible above a true one only, so the lowest alarm is true).
fn plain_prefix(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::MAX / 255;
    const HIGH: u64 = ONES << 7;
    let has_below =
        |word: u64, limit: u8| word.wrapping_sub(ONES * u64::from(limit)) & !word & HIGH;
    let alarms = |chunk: &[u8; 8]| {
        let word = u64::from_le_bytes(*chunk);
        let quote = has_below(word ^ (ONES * u64::from(b'"')), 1);
        let backslash = has_below(word ^ (ONES * u64::from(b'\\')), 1);
        quote | backslash | has_below(word, 0x20)
    };
    let (chunks, rest) = bytes.as_chunks::<8>();
    for (i, chunk) in chunks.iter().enumerate() {
        let found = alarms(chunk);
        if found != 0 {
            return 8 * i + found.trailing_zeros() as usize / 8;
        }
    }
    let special = |b: &u8| matches!(b, b'"' | b'\\' | 0..=0x1f);
    let last = rest.iter().position(special).unwrap_or(rest.len());
    8 * chunks.len() + last
}

fn unescape(raw: &str) -> Option<String> {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = *rest.as_bytes().get(at + 1)?;
        let mut used = 2;
        out.push(match escape {
            b'"' | b'\\' | b'/' => escape as char,
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let (c, len) = unicode_escape(&rest[at..])?;
                used = len;
                c
            }
            _ => return None,
        });
        rest = &rest[at + used..];
    }
    out.push_str(rest);
    // Escapes take up to six times their room, and a header may have many names.
    out.shrink_to_fit();
    Some(out)
}

/// `\uXXXX`, or two of them for a surrogate pair: the character and the bytes used.
fn unicode_escape(text: &str) -> Option<(char, usize)> {
    let unit = |at: usize| {
        let digits = text.as_bytes().get(at..)?.strip_prefix(b"\\u")?;
        let digits = digits.first_chunk::<4>()?;
        digits
            .iter()
            .try_fold(0, |n, d| Some(n << 4 | char::from(*d).to_digit(16)?))
    };
    let first = unit(0)?;
    match first {
        0xd800..=0xdbff => {
            let second = unit(6).filter(|u| (0xdc00..=0xdfff).contains(u))?;
            let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
            Some((char::from_u32(code)?, 12))
        }
        _ => Some((char::from_u32(first)?, 6)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reader(text: &str) -> Reader<'_> {
        Reader::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn numbers_are_whole() {
        assert_eq!(reader(" 18446744073709551615").unsigned(), Ok(u64::MAX));
        assert_eq!(reader("0,").unsigned(), Ok(0));
        for bad in [
            "",
            "-1",
            "1.0",
            "1e3",
            "01",
            "18446744073709551616",
            "x",
            "+1",
            "\"1\"",
        ] {
            assert!(reader(bad).unsigned().is_err(), "{bad}");
        }
        assert_eq!(reader("[1, 2 ,3]").numbers(3), Ok(vec![1, 2, 3]));
        assert!(reader("[1,2,3]").numbers(2).is_err());
        assert!(reader("[1,2,]").numbers(9).is_err());
        assert!(reader("[1 2]").numbers(9).is_err());
    }

    #[test]
    fn strings_are_bounded_and_unescaped() {
        assert_eq!(reader(r#" "ab" "#).string(2).unwrap(), "ab");
        assert!(reader(r#""abc""#).string(2).is_err());
        assert_eq!(
            reader(r#""a\u00e9\n\ud83d\ude00\/""#).string(20).unwrap(),
            "aé\n😀/"
        );
        for bad in [
            r#""abc"#,
            r#""\x""#,
            r#""\u12""#,
            r#""\ud800""#,
            r#""\ud800\u0041""#,
            r#""\u+123""#,
            "\"a\nb\"",
            r#""\"#,
            "'a'",
        ] {
            assert!(reader(bad).string(20).is_err(), "{bad}");
        }
        assert!(Reader::new(b"\"\xff\"").is_err());
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(reader(&deep(60)).skip().is_ok());
        assert!(reader(&deep(1_000_000)).skip().is_err());
        assert!(reader(&"{\"a\":".repeat(1_000_000)).skip().is_err());
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::{Value, json};
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(|b| json!(b)),
            any::<u64>().prop_map(|n| json!(n)),
            any::<f64>().prop_map(|x| json!(x)),
            any::<String>().prop_map(|s| json!(s)),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(|v| json!(v)),
                prop::collection::hash_map(any::<String>(), inner, 0..5).prop_map(|m| json!(m)),
            ]
        })
    }

    proptest! {
        #[test]
        fn plain_prefixes_are_plain(bytes in prop::collection::vec(any::<u8>(), 0..64), plain in "[ -!#-Z^-~]{0,40}") {
            let special = |b: &u8| matches!(b, b'"' | b'\\' | 0..=0x1f);
            let first = bytes.iter().position(special).unwrap_or(bytes.len());
            prop_assert_eq!(plain_prefix(&bytes), first);
            prop_assert_eq!(plain_prefix(plain.as_bytes()), plain.len());
        }

        /// Everything serde_json writes is passed over whole, and strings read as serde_json reads them.
        #[test]
        fn agrees_with_serde_json(value in any_json(), text in any::<String>()) {
            let written = serde_json::to_string_pretty(&value).unwrap();
            let mut r = reader(&written);
            prop_assert_eq!(r.skip(), Ok(()));
            prop_assert_eq!(r.end(), Ok(()));
            let written = serde_json::to_string(&text).unwrap();
            let mut r = reader(&written);
            prop_assert_eq!(r.string(1 << 20).unwrap(), text);
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(mut r) = Reader::new(&bytes) {
                let _ = r.skip();
                let _ = r.end();
            }
        }
    }
}
