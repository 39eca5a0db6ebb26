//! The `qcc` program.

fn main() -> std::process::ExitCode {
    qcc::cli::main(qcc::registry())
}
