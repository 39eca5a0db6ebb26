//! `qcc` with one more pass.

use int8_embedding::Int8Embedding;

fn main() -> std::process::ExitCode {
    qcc::cli::main(qcc::registry().with::<Int8Embedding>())
}
