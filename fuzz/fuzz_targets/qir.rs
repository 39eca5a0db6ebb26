//! Any text is a module or an error with a place in the text; a module prints to what reads back to the same print,
//! and the verifier takes it.
#![no_main]

use dialects::ir::print::{Style, print};
use dialects::ir::{parse, verify};
use dialects::ops::Ops;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let module = match parse::parse(text) {
        Ok(parsed) => parsed.module,
        Err(e) => {
            assert!(text.get(e.span()).is_some(), "{e:?}");
            return;
        }
    };
    for style in [Style::COMPACT, Style::FULL] {
        let once = print(&module, style);
        let again = parse::parse(&once).expect("what is printed can be read").module;
        assert!(print(&again, style) == once, "a print reads back as it is");
    }
    verify::verify(&module, &Ops::standard());
});
