//! The `qcc` program.

/// Tensors come and go with every op: the system allocator would return their pages to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // Only the program links the compiler, and not the library: what is built on it stays small.
    if std::env::args_os().nth(1).is_some_and(|a| a == qcc::compiler::WORKER) {
        return codegen_mlir::worker();
    }
    qcc::cli::main(qcc::registry())
}
