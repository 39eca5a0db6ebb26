//! Any bytes are a model or an error; a model can be written, and is then the same model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcc::onnx::{export, import};

fuzz_target!(|bytes: &[u8]| {
    let Ok(first) = import::from_bytes(bytes.to_vec().into()) else { return };
    let written = export::to_bytes(&first.module).expect("what was read can be written");
    let second = import::from_bytes(written.clone().into()).expect("what was written can be read");
    let again = export::to_bytes(&second.module).expect("what was read can be written");
    assert!(written == again, "a model that was written is written again the same");
});
