//! Tokens become text as they come: a character may take several tokens, and text that may begin a stop string waits.

use tokenizers::Tokenizer;

/// What a tokenizer puts where bytes are no character yet.
const INCOMPLETE: char = '\u{fffd}';

/// Special tokens that end a text, by the names that models give them.
const ENDS: &[&str] = &[
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<eos>",
    "<end_of_turn>",
    "[EOS]",
];

/// The tokens that end a text.
pub fn ends(tokenizer: &Tokenizer) -> Vec<u32> {
    ENDS.iter().filter_map(|name| tokenizer.token_to_id(name)).collect()
}

/// The text of tokens, of which the first were given.
pub struct Text<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// Tokens from here on are decoded together, so that spaces between words are right; those before `read` are out.
    from: usize,
    read: usize,
}

impl<'t> Text<'t> {
    /// Behind the tokens `given`, whose text is not given back.
    pub fn after(tokenizer: &'t Tokenizer, given: &[u32]) -> Text<'t> {
        let read = given.len();
        Text { tokenizer, ids: given.to_vec(), from: read.saturating_sub(8), read }
    }

    /// The text that is complete with one more token.
    pub fn push(&mut self, id: u32) -> tokenizers::Result<String> {
        self.ids.push(id);
        self.take(false)
    }

    /// What remains, complete or not.
    pub fn rest(&mut self) -> tokenizers::Result<String> {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> tokenizers::Result<String> {
        let old = self.tokenizer.decode(&self.ids[self.from..self.read], true)?;
        let new = self.tokenizer.decode(&self.ids[self.from..], true)?;
        if new.ends_with(INCOMPLETE) && !all {
            return Ok(String::new());
        }
        (self.from, self.read) = (self.read, self.ids.len());
        // The given text itself may end within a character.
        let common = new.bytes().zip(old.bytes()).take_while(|(a, b)| a == b).count();
        let at = (0..=common).rev().find(|&i| new.is_char_boundary(i)).unwrap_or(0);
        Ok(new[at..].to_string())
    }
}

/// Watches for strings that end a text.
#[derive(Debug, Default)]
pub struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    /// Ends at the first of these; empty ones are left out.
    pub fn new(stops: &[String]) -> Stops {
        Stops { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// More text: what may be shown of it, and whether a stop string came, which is not shown.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            let shown = self.held[..at].to_string();
            self.held.clear();
            return (shown, true);
        }
        let begins = |at: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*at..]));
        let at = self.held.char_indices().map(|(i, _)| i).find(begins).unwrap_or(self.held.len());
        let kept = self.held.split_off(at);
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// What was held back.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/models/tokenizer.json");
        Tokenizer::from_file(path).unwrap()
    }

    #[test]
    fn characters_of_several_tokens_come_whole() {
        let tokenizer = tokenizer();
        let text = " A caf\u{e9} \u{4f60}\u{597d}\u{1f600} \u{fffd} end";
        let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert!(ids.len() > text.chars().filter(|c| !c.is_ascii()).count() + 4, "{ids:?}");
        for given in 0..ids.len() {
            let mut out = Text::after(&tokenizer, &ids[..given]);
            let mut pieces: Vec<String> = ids[given..].iter().map(|&id| out.push(id).unwrap()).collect();
            pieces.push(out.rest().unwrap());
            let all = pieces.concat();
            if given == 0 {
                assert_eq!(all.trim_start(), text.trim_start());
            }
            assert!(text.ends_with(&all) || given > 0 && all.contains(INCOMPLETE), "{given}: {all:?}");
        }
        let mut cut = Text::after(&tokenizer, &[]);
        let smile = tokenizer.encode("\u{1f600}", false).unwrap().get_ids().to_vec();
        let shown: String = smile[..smile.len() - 1].iter().map(|&id| cut.push(id).unwrap()).collect();
        assert!(!shown.contains(INCOMPLETE));
        assert!(cut.rest().unwrap().contains(INCOMPLETE));
        assert_eq!(ends(&tokenizer), [0]);
    }

    #[test]
    fn stop_strings_are_not_shown() {
        let mut stops = Stops::new(&["END".into(), String::new(), "\n\n".into()]);
        assert_eq!(stops.push("some"), ("some".into(), false));
        assert_eq!(stops.push(" \n"), (" ".into(), false));
        assert_eq!(stops.push("E"), ("\n".into(), false));
        assert_eq!(stops.push("N"), ("".into(), false));
        assert_eq!(stops.push("TER E"), ("ENTER ".into(), false));
        assert_eq!(stops.push("ND more"), ("".into(), true));
        assert_eq!(stops.push("x\n\nEND"), ("x".into(), true));
        let mut stops = Stops::new(&["END".into()]);
        assert_eq!(stops.push("the \u{e9}EN"), ("the \u{e9}".into(), false));
        assert_eq!(stops.rest(), "EN");
        assert_eq!(Stops::new(&[]).push("all"), ("all".into(), false));
    }
}
