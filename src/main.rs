//! The `qcc` program.

/// Tensors come and go with every op: the system allocator would return their pages to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    qcc::cli::main(qcc::registry())
}
