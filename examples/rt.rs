fn main() {
    let a: Vec<String> = std::env::args().collect();
    let t = std::time::Instant::now();
    match qcc::onnx::import::read(a[1].as_ref()) {
        Err(e) => {
            eprintln!("error: {e}");
            std::process::exit(1)
        }
        Ok(i) => {
            eprintln!(
                "import {:?} warnings {:?} files {}",
                t.elapsed(),
                i.warnings.iter().map(|w| w.to_string()).collect::<Vec<_>>(),
                i.files.len()
            );
            let t = std::time::Instant::now();
            let o = qcc::onnx::export::Options { external_data: a.get(3).is_some(), inputs: i.files };
            match qcc::onnx::export::write(&i.module, a[2].as_ref(), &o, &mut |_, _| {}) {
                Err(e) => {
                    eprintln!("error: {e}");
                    std::process::exit(1)
                }
                Ok(w) => eprintln!("export {:?} {:?}", t.elapsed(), w),
            }
        }
    }
}
