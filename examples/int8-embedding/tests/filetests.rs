//! The pass's own `.qir` tests, run by the harness that qcc itself uses.

#[test]
fn int8_embedding() {
    let registry = qcc::registry().with::<int8_embedding::Int8Embedding>();
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata");
    if let Err(e) = qcc::filetest::run_dir(dir, &registry) {
        panic!("{e}");
    }
}
