//! Token ids → text as it is generated: whole characters only, and together exactly the text of the whole sequence.

use super::tokenizer::Tokenizer;
use crate::error::Result;

/// Tokens that may end in a part of a character: a character has at most four bytes, so three can be waiting for a fourth.
const MAX_UNFINISHED: usize = 3;
/// Beyond so many tokens without a clean end the older ones are shown as they decode: what they hold is no character.
const MAX_HELD: usize = 8;
const REPLACEMENT: char = '\u{FFFD}';

/// Turns one sequence's tokens into text, piece by piece.
///
/// Tokens cut characters in two (byte-level and byte-fallback vocabularies), and a token's leading space depends on the
/// token before it (metaspace vocabularies). A piece is handed out only when it ends at a whole character; U+FFFD appears
/// only for bytes that cannot become one, or at [`TokenStream::finish`].
#[derive(Clone, Debug)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// Byte-level vocabularies: decoding is concatenating bytes. Holds an unfinished character.
    Bytes(Vec<u8>),
    /// All others: the window `ids` is decoded with and without its fresh part, and the difference is new, as vLLM and
    /// text-generation-inference do it. `ids[..read]` has been handed out and decodes to `shown`.
    Window {
        ids: Vec<u32>,
        read: usize,
        shown: String,
    },
}

impl TokenStream {
    /// The text of the generated tokens alone, as `decode` of them would give it.
    pub fn new(tokenizer: &Tokenizer, skip_special_tokens: bool) -> TokenStream {
        let state = if tokenizer.is_byte_level() {
            State::Bytes(Vec::new())
        } else {
            State::Window {
                ids: Vec::new(),
                read: 0,
                shown: String::new(),
            }
        };
        TokenStream {
            tokenizer: tokenizer.clone(),
            skip_special: skip_special_tokens,
            state,
        }
    }

    /// The text as it continues `prompt`: with a metaspace vocabulary the first word keeps its leading space.
    pub fn after(
        tokenizer: &Tokenizer,
        skip_special_tokens: bool,
        prompt: &[u32],
    ) -> Result<TokenStream> {
        let mut stream = TokenStream::new(tokenizer, skip_special_tokens);
        if let State::Window { ids, read, shown } = &mut stream.state {
            let visible = |id: &&u32| !(skip_special_tokens && tokenizer.is_special(**id));
            ids.extend(prompt.iter().rev().filter(visible).take(MAX_HELD));
            ids.reverse();
            *read = ids.len();
            *shown = tokenizer.decode(ids, skip_special_tokens)?;
        }
        Ok(stream)
    }

    /// Takes the next token and appends to `out` the text that is now certain (often a word, sometimes nothing).
    pub fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(());
        }
        match &mut self.state {
            State::Bytes(pending) => {
                if let Some(token) = self.tokenizer.id_to_token(id) {
                    token_bytes(&token, pending);
                    take_characters(pending, out);
                }
                Ok(())
            }
            State::Window { ids, read, shown } => {
                ids.push(id);
                let decode = |ids: &[u32]| self.tokenizer.decode(ids, self.skip_special);
                let mut full = decode(ids)?;
                let mut end = ids.len();
                if addition(shown, &full).ends_with(REPLACEMENT) {
                    if ids.len() - *read <= MAX_HELD {
                        return Ok(());
                    }
                    end -= MAX_UNFINISHED;
                    full = decode(&ids[..end])?;
                }
                let new = addition(shown, &full);
                if !new.is_empty() {
                    out.push_str(new);
                    ids.drain(..*read);
                    *read = end - *read;
                    *shown = decode(&ids[..*read])?;
                }
                Ok(())
            }
        }
    }

    /// The sequence is over: appends what was held back. An unfinished character comes out as U+FFFD.
    pub fn finish(&mut self, out: &mut String) -> Result<()> {
        match &mut self.state {
            State::Bytes(pending) => {
                out.push_str(&String::from_utf8_lossy(pending));
                pending.clear();
            }
            State::Window { ids, read, shown } => {
                let full = self.tokenizer.decode(ids, self.skip_special)?;
                out.push_str(addition(shown, &full));
                *read = ids.len();
                *shown = full;
            }
        }
        Ok(())
    }
}

/// What `full` has beyond `shown`. Decoders that look back (a stray byte spoils the byte-fallback run before it) may change
/// what was handed out already; then characters are counted, for they cannot be taken back.
fn addition<'a>(shown: &str, full: &'a str) -> &'a str {
    if let Some(rest) = full.strip_prefix(shown) {
        return rest;
    }
    let mut chars = full.chars();
    chars.by_ref().take(shown.chars().count()).for_each(drop);
    chars.as_str()
}

/// Appends the bytes that a byte-level token stands for. A token with characters outside GPT-2's alphabet (added tokens)
/// stands for its own UTF-8, as in the tokenizers crate.
fn token_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The byte that `c` spells in GPT-2's byte alphabet: printable Latin-1 spells itself, the 68 others follow from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        // In order: 0x00–0x20, 0x7f–0xa0, 0xad.
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Moves whole characters from `bytes` to `out`; bytes that can never be part of one become U+FFFD, as in
/// `String::from_utf8_lossy`; the beginning of a character at the end stays.
fn take_characters(bytes: &mut Vec<u8>, out: &mut String) {
    let mut done = 0;
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(text) => {
                out.push_str(text);
                done = bytes.len();
                break;
            }
            Err(e) => {
                let good = done + e.valid_up_to();
                out.push_str(&String::from_utf8_lossy(&bytes[done..good]));
                done = good;
                match e.error_len() {
                    Some(bad) => {
                        out.push(REPLACEMENT);
                        done += bad;
                    }
                    None => break,
                }
            }
        }
    }
    bytes.drain(..done);
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
