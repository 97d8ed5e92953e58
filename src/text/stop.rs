//! Stop strings, wherever token boundaries fall.

use crate::error::{Code, Error, Result};

/// The stop strings of a request, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStrings(Vec<String>);

impl StopStrings {
    /// An empty stop string would stop before the first character: Code::Usage.
    pub fn new(stops: impl IntoIterator<Item = impl Into<String>>) -> Result<StopStrings> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if stops.iter().any(String::is_empty) {
            return Err(Error::new(
                Code::Usage,
                "a stop string is empty",
                "an empty string is found everywhere: nothing would be generated",
                "leave it out, or give the text to stop at",
            ));
        }
        Ok(StopStrings(stops))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Lets text through up to the first stop string, holding back what may yet become part of one.
///
/// The result does not depend on how the text is cut into pieces: the stop string that *ends* first wins, and of two that
/// end together the longer one, just as if characters came one by one.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: StopStrings,
    held: String,
    hit: Option<usize>,
}

impl StopMatcher {
    pub fn new(stops: StopStrings) -> StopMatcher {
        StopMatcher {
            stops,
            held: String::new(),
            hit: None,
        }
    }

    /// Takes the next piece of generated text and appends to `out` what is certain to come before any stop string.
    /// True: a stop string was met, the text is complete and whatever follows is ignored.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.hit.is_some() {
            return true;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        let fresh = self.held.len();
        self.held.push_str(text);
        if let Some((start, which)) = self.first_match(fresh) {
            out.push_str(&self.held[..start]);
            self.held.clear();
            self.hit = Some(which);
            return true;
        }
        let keep = self.possible_start();
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        false
    }

    /// The sequence ended for another reason: what was held back is ordinary text after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The stop string that was met.
    pub fn matched(&self) -> Option<&str> {
        self.hit.map(|i| self.stops.0[i].as_str())
    }

    /// (start, index) of the match that ends first; only ends beyond `fresh` are new.
    fn first_match(&self, fresh: usize) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize, usize)> = None;
        for (which, stop) in self.stops.0.iter().enumerate() {
            // No match ended inside the held text, so a match starts no earlier than this.
            let mut from = fresh.saturating_sub(stop.len() - 1);
            while !self.held.is_char_boundary(from) {
                from -= 1;
            }
            if let Some(at) = self.held[from..].find(stop.as_str()) {
                let (start, end) = (from + at, from + at + stop.len());
                if best.is_none_or(|(s, e, _)| (end, start) < (e, s)) {
                    best = Some((start, end, which));
                }
            }
        }
        best.map(|(start, _, which)| (start, which))
    }

    /// Where the longest end of the held text begins that is the beginning of a stop string.
    fn possible_start(&self) -> usize {
        let longest = self.stops.0.iter().map(|s| s.len() - 1).max().unwrap_or(0);
        let n = self.held.len();
        (n.saturating_sub(longest)..n)
            .filter(|&i| self.held.is_char_boundary(i))
            .find(|&i| self.stops.0.iter().any(|s| s.starts_with(&self.held[i..])))
            .unwrap_or(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut m = StopMatcher::new(StopStrings::new(stops.iter().copied()).unwrap());
        let mut out = String::new();
        for p in pieces {
            if m.push(p, &mut out) {
                break;
            }
        }
        m.finish(&mut out);
        (out, m.matched().map(str::to_owned))
    }

    #[test]
    fn across_pieces() {
        let (out, hit) = run(&["\n\nUser:"], &["Hi", "\n", "\nUs", "er", ": x"]);
        assert_eq!((out.as_str(), hit.as_deref()), ("Hi", Some("\n\nUser:")));
    }

    #[test]
    fn a_false_start_comes_out_whole() {
        let mut m = StopMatcher::new(StopStrings::new(["END"]).unwrap());
        let mut out = String::new();
        assert!(!m.push("the E", &mut out));
        assert_eq!(out, "the ");
        assert!(!m.push("N", &mut out));
        assert_eq!(out, "the ");
        assert!(!m.push("EMY", &mut out));
        assert_eq!(out, "the ENEMY");
    }

    #[test]
    fn the_end_flushes_what_was_held() {
        let (out, hit) = run(&["</s>"], &["a</", "s"]);
        assert_eq!((out.as_str(), hit), ("a</s", None));
    }

    #[test]
    fn first_end_wins_and_the_longer_of_equals() {
        assert_eq!(run(&["abc", "b"], &["xabc"]).0, "xa");
        assert_eq!(
            run(&["c", "abc"], &["xabc"]),
            ("x".into(), Some("abc".into()))
        );
    }

    #[test]
    fn overlapping_prefix_inside_a_stop() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).0, "a");
        assert_eq!(run(&["ééa"], &["é", "é", "éa!"]).0, "é");
    }

    #[test]
    fn nothing_after_the_stop() {
        let mut m = StopMatcher::new(StopStrings::new(["."]).unwrap());
        let mut out = String::new();
        assert!(m.push("a.b", &mut out));
        assert!(m.push("c", &mut out));
        m.finish(&mut out);
        assert_eq!(out, "a");
    }

    #[test]
    fn empty_stop_is_refused() {
        assert_eq!(StopStrings::new(["a", ""]).unwrap_err().code(), Code::Usage);
        assert_eq!(run(&[], &["a", "b"]).0, "ab");
    }

    /// The slow definition: characters come one by one.
    fn naive(stops: &[String], text: &str) -> (String, Option<String>) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            let hit = stops
                .iter()
                .filter(|s| seen.ends_with(s.as_str()))
                .max_by_key(|s| s.len());
            if let Some(s) = hit {
                seen.truncate(seen.len() - s.len());
                return (seen, Some(s.clone()));
            }
        }
        (seen, None)
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,5}", 0..12),
        ) {
            let text = pieces.concat();
            let mut m = StopMatcher::new(StopStrings::new(stops.clone()).unwrap());
            let (mut out, mut stopped) = (String::new(), false);
            let expected = naive(&stops, &text);
            for p in &pieces {
                stopped = m.push(p, &mut out);
                prop_assert!(expected.0.starts_with(&out), "{out:?} shows more than {:?}", expected.0);
                if stopped { break; }
            }
            m.finish(&mut out);
            prop_assert_eq!(stopped, expected.1.is_some());
            prop_assert_eq!((out, m.matched().map(str::to_owned)), expected);
        }
    }
}
