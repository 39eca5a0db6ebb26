//! The LLVM dialect, translated, optimized and written as an object. LLVM has only a C interface here, hence the
//! `unsafe`: every pointer is made and disposed of in this file, and none outlives [`emit`].
#![allow(unsafe_code)]

use codegen::target::Arch;
use codegen::{CompileError, Form, Target};
use llvm_sys::core::*;
use llvm_sys::prelude::*;
use llvm_sys::target::*;
use llvm_sys::target_machine::*;
use llvm_sys::transforms::pass_builder::*;
use melior::ir::Module;
use std::ffi::{CStr, CString, c_char};
use std::ptr::{null, null_mut};

unsafe extern "C" {
    /// Of MLIR's C interface, with the types of `llvm-sys` in place of the opaque ones of `mlir-sys`.
    fn mlirTranslateModuleToLLVMIR(module: mlir_sys::MlirOperation, context: LLVMContextRef)
    -> LLVMModuleRef;
}

fn refused(stage: &str, message: impl Into<String>) -> CompileError {
    CompileError::Refused { stage: stage.to_owned(), message: message.into() }
}

/// The message, which LLVM wants back.
unsafe fn take_message(message: *mut c_char) -> String {
    if message.is_null() {
        return String::new();
    }
    // SAFETY: LLVM gives a NUL-terminated string that is ours until it is disposed of.
    unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        LLVMDisposeMessage(message);
        text
    }
}

/// Translates a module in the LLVM dialect and compiles it.
pub fn emit(module: &Module, target: &Target, form: Form) -> Result<Vec<u8>, CompileError> {
    // SAFETY: the context outlives the module, and both are disposed of after their last use.
    unsafe {
        let context = LLVMContextCreate();
        let llvm = mlirTranslateModuleToLLVMIR(module.as_operation().to_raw(), context);
        let result = match llvm.is_null() {
            true => Err(refused("translation to LLVM", "no module came out")),
            false => compile(llvm, target, form),
        };
        if !llvm.is_null() {
            LLVMDisposeModule(llvm);
        }
        LLVMContextDispose(context);
        result
    }
}

unsafe fn compile(module: LLVMModuleRef, target: &Target, form: Form) -> Result<Vec<u8>, CompileError> {
    // SAFETY: as in `emit`; strings live until the calls that read them return.
    unsafe {
        match target.machine().arch {
            Arch::X86_64 => {
                LLVMInitializeX86TargetInfo();
                LLVMInitializeX86Target();
                LLVMInitializeX86TargetMC();
                LLVMInitializeX86AsmPrinter();
                LLVMInitializeX86AsmParser();
            }
            Arch::Aarch64 => {
                LLVMInitializeAArch64TargetInfo();
                LLVMInitializeAArch64Target();
                LLVMInitializeAArch64TargetMC();
                LLVMInitializeAArch64AsmPrinter();
                LLVMInitializeAArch64AsmParser();
            }
        }
        let c = |s: &str| CString::new(s).expect("no NUL in a name of a target");
        let (triple, cpu, features) = (c(target.triple()), c(target.llvm_cpu()), c(&target.llvm_features()));
        let mut found = null_mut();
        let mut message = null_mut();
        if LLVMGetTargetFromTriple(triple.as_ptr(), &mut found, &mut message) != 0 {
            return Err(refused("the target", take_message(message)));
        }
        let machine = LLVMCreateTargetMachine(
            found,
            triple.as_ptr(),
            cpu.as_ptr(),
            features.as_ptr(),
            LLVMCodeGenOptLevel::LLVMCodeGenLevelAggressive,
            LLVMRelocMode::LLVMRelocPIC,
            LLVMCodeModel::LLVMCodeModelDefault,
        );
        LLVMSetTarget(module, triple.as_ptr());
        let layout = LLVMCreateTargetDataLayout(machine);
        LLVMSetModuleDataLayout(module, layout);
        set_function_features(module, &cpu, &features);
        let result = match form {
            Form::Llvm => Ok(take_message(LLVMPrintModuleToString(module)).into_bytes()),
            Form::Asm | Form::Object => optimize(module, machine).and_then(|()| write(module, machine, form)),
        };
        LLVMDisposeTargetData(layout);
        LLVMDisposeTargetMachine(machine);
        result
    }
}

/// Optimizations ask each function, not the machine, which instructions they may count on.
unsafe fn set_function_features(module: LLVMModuleRef, cpu: &CStr, features: &CStr) {
    // SAFETY: the functions belong to the module; the strings are copied.
    unsafe {
        let context = LLVMGetModuleContext(module);
        let mut f = LLVMGetFirstFunction(module);
        while !f.is_null() {
            for (key, value) in [(c"target-cpu", cpu), (c"target-features", features)] {
                let (k, v) = (key.to_bytes(), value.to_bytes());
                let attribute = LLVMCreateStringAttribute(
                    context,
                    key.as_ptr(),
                    k.len() as u32,
                    value.as_ptr(),
                    v.len() as u32,
                );
                LLVMAddAttributeAtIndex(f, llvm_sys::LLVMAttributeFunctionIndex, attribute);
            }
            f = LLVMGetNextFunction(f);
        }
    }
}

unsafe fn optimize(module: LLVMModuleRef, machine: LLVMTargetMachineRef) -> Result<(), CompileError> {
    // SAFETY: the options live until the run is over; an error is taken as its message.
    unsafe {
        let options = LLVMCreatePassBuilderOptions();
        let error = LLVMRunPasses(module, c"default<O3>".as_ptr(), machine, options);
        LLVMDisposePassBuilderOptions(options);
        if error.is_null() {
            return Ok(());
        }
        let message = llvm_sys::error::LLVMGetErrorMessage(error);
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        llvm_sys::error::LLVMDisposeErrorMessage(message);
        Err(refused("LLVM's optimizer", text))
    }
}

unsafe fn write(
    module: LLVMModuleRef,
    machine: LLVMTargetMachineRef,
    form: Form,
) -> Result<Vec<u8>, CompileError> {
    let kind = match form {
        Form::Asm => LLVMCodeGenFileType::LLVMAssemblyFile,
        _ => LLVMCodeGenFileType::LLVMObjectFile,
    };
    // SAFETY: the buffer is copied before it is disposed of.
    unsafe {
        let (mut message, mut buffer) = (null_mut(), null_mut());
        if LLVMTargetMachineEmitToMemoryBuffer(machine, module, kind, &mut message, &mut buffer) != 0 {
            return Err(refused("LLVM's code generator", take_message(message)));
        }
        let start: *const c_char = LLVMGetBufferStart(buffer);
        let start = if start.is_null() { null() } else { start.cast::<u8>() };
        let bytes = match start.is_null() {
            true => Vec::new(),
            false => std::slice::from_raw_parts(start, LLVMGetBufferSize(buffer)).to_vec(),
        };
        LLVMDisposeMemoryBuffer(buffer);
        Ok(bytes)
    }
}
