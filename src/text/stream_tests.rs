use super::*;
use crate::text::tokenizer::tests::{byte_fallback, byte_level, load};
use proptest::prelude::*;
use std::sync::OnceLock;

fn gpt() -> &'static Tokenizer {
    static T: OnceLock<Tokenizer> = OnceLock::new();
    T.get_or_init(|| load(&byte_level(), None))
}

fn llama() -> &'static Tokenizer {
    static T: OnceLock<Tokenizer> = OnceLock::new();
    T.get_or_init(|| load(&byte_fallback(), None))
}

/// The pieces, the last one from `finish`.
fn pieces(t: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
    let mut stream = TokenStream::new(t, skip);
    let mut all: Vec<String> = ids
        .iter()
        .map(|&id| {
            let mut out = String::new();
            stream.push(id, &mut out).unwrap();
            out
        })
        .collect();
    let mut out = String::new();
    stream.finish(&mut out).unwrap();
    all.push(out);
    all
}

#[test]
fn the_byte_alphabet_is_whole() {
    let mut seen = [false; 256];
    for c in (0u32..0x200).filter_map(char::from_u32) {
        if let Some(b) = byte_of(c) {
            assert!(!std::mem::replace(&mut seen[b as usize], true));
            // Token ids 0–255 of the test vocabulary are the bytes in order.
            assert_eq!(gpt().token_to_id(&c.to_string()), Some(u32::from(b)));
        }
    }
    assert!(seen.iter().all(|s| *s));
}

#[test]
fn characters_come_whole() {
    for t in [gpt(), llama()] {
        let text = "ab é 🚀测 c";
        let ids = t.encode(text, false).unwrap();
        let parts = pieces(t, &ids, true);
        assert!(parts.iter().all(|p| !p.contains('\u{FFFD}')), "{parts:?}");
        assert_eq!(parts.concat(), text);
        let rocket = parts.iter().find(|p| p.contains('🚀')).unwrap();
        assert_eq!(rocket, "🚀");
    }
}

#[test]
fn a_cut_character_shows_only_at_the_end() {
    for (t, ids) in [(gpt(), [0xf0, 0x9f, 0x9a]), (llama(), [0xf3, 0xa2, 0x9d])] {
        let parts = pieces(t, &ids, true);
        assert_eq!(parts[..3].concat(), "");
        assert_eq!(parts[3], t.decode(&ids, true).unwrap());
    }
}

#[test]
fn leading_spaces() {
    let t = llama();
    let id = |s: &str| t.token_to_id(s).unwrap();
    let ids = [
        id("▁abc"),
        id("▁"),
        id("▁a"),
        id("</s>"),
        id("▁bc"),
        id("é"),
    ];
    assert_eq!(
        pieces(t, &ids, true),
        ["abc", " ", " a", "", " bc", "é", ""]
    );
    assert_eq!(pieces(t, &ids, false).concat(), "abc  a</s> bcé");
    // The first word after a prompt keeps its space.
    let mut out = String::new();
    let mut stream = TokenStream::after(t, true, &[1, id("▁a")]).unwrap();
    stream.push(id("▁bc"), &mut out).unwrap();
    stream.finish(&mut out).unwrap();
    assert_eq!(out, " bc");
}

#[test]
fn special_tokens_are_skipped_or_shown() {
    let t = gpt();
    let ids = t.encode("a<|end|>b<tool>", false).unwrap();
    assert_eq!(pieces(t, &ids, true).concat(), "ab<tool>");
    assert_eq!(pieces(t, &ids, false).concat(), "a<|end|>b<tool>");
    assert_eq!(pieces(t, &[70_000, 104], true).concat(), "h");
}

#[test]
fn a_real_replacement_character_passes() {
    for t in [gpt(), llama()] {
        let ids = t.encode("a\u{FFFD}b", false).unwrap();
        assert_eq!(pieces(t, &ids, true).concat(), "a\u{FFFD}b");
    }
}

#[test]
fn garbage_bytes_do_not_pile_up() {
    // Continuation bytes for ever: text must come, and the window must stay small.
    let ids = vec![3 + 0x9f_u32; 500];
    let mut stream = TokenStream::new(llama(), true);
    let mut out = String::new();
    for id in ids {
        stream.push(id, &mut out).unwrap();
    }
    assert!(out.chars().count() > 400);
    let State::Window { ids, .. } = &stream.state else {
        panic!("a byte-fallback vocabulary uses the window");
    };
    assert!(ids.len() <= 2 * MAX_HELD + 2, "{}", ids.len());
}

proptest! {
    /// Byte-level: whatever the ids, the pieces are the text of the whole.
    #[test]
    fn byte_level_equals_whole_decode(
        ids in prop::collection::vec(prop_oneof![0u32..300, 128u32..256, 255u32..265], 0..80),
        skip in any::<bool>(),
    ) {
        let parts = pieces(gpt(), &ids, skip);
        let whole = gpt().decode(&ids, skip).unwrap();
        prop_assert_eq!(parts.concat(), whole);
    }

    /// Byte fallback: so for every text (ids of stray bytes have no whole decode that a stream could know in time) …
    #[test]
    fn byte_fallback_equals_whole_decode(text in "[abc é🚀测\u{301} ]{0,40}", skip in any::<bool>()) {
        let ids = llama().encode(&text, true).unwrap();
        let parts = pieces(llama(), &ids, skip);
        let clean = |p: &String| !p.contains('\u{FFFD}');
        prop_assert!(parts[..parts.len() - 1].iter().all(clean));
        prop_assert_eq!(parts.concat(), llama().decode(&ids, skip).unwrap());
    }

    /// … and for ids without stray bytes.
    #[test]
    fn byte_fallback_equals_whole_decode_of_ids(
        ids in prop::collection::vec(prop_oneof![0u32..3, 35u32..128, 259u32..270], 0..60),
        skip in any::<bool>(),
    ) {
        let parts = pieces(llama(), &ids, skip);
        prop_assert_eq!(parts.concat(), llama().decode(&ids, skip).unwrap());
    }

    /// Random ids never break the stream, and what was shown is never taken back.
    #[test]
    fn byte_fallback_survives_anything(ids in prop::collection::vec(0u32..300, 0..120)) {
        let parts = pieces(llama(), &ids, true);
        prop_assert_eq!(parts.len(), ids.len() + 1);
    }
}
