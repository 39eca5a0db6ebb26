//! The C header of a compiled model.

use runtime::{About, Dim, Elem, Port};
use std::fmt::Write;

fn c_type(elem: Elem) -> &'static str {
    match elem {
        Elem::F32 => "float",
        Elem::I64 => "int64_t",
        Elem::I32 => "int32_t",
        Elem::I8 => "int8_t",
        Elem::U8 | Elem::Bool => "uint8_t",
    }
}

fn line(p: &Port, i: usize) -> String {
    let shape: Vec<String> = p.shape.iter().map(Dim::to_string).collect();
    format!(" *   [{i}] {}: {}[{}]\n", p.name, c_type(p.elem), shape.join("]["))
}

/// The header: what the symbols of the library are, and how large its buffers must be.
pub fn header(about: &About) -> String {
    let mut out = String::new();
    let mut dims = String::new();
    for (i, (name, bound)) in about.dims.iter().enumerate() {
        writeln!(dims, " *   [{i}] {name}: 0 to {bound}").expect("a String takes all");
    }
    if about.dims.is_empty() {
        dims.push_str(" *   none: dims may be null\n");
    }
    let inputs: String = about.inputs.iter().enumerate().map(|(i, p)| line(p, i)).collect();
    let outputs: String = about.outputs.iter().enumerate().map(|(i, p)| line(p, i)).collect();
    let mut versions = String::new();
    for (i, v) in about.versions.iter().enumerate() {
        let features: Vec<String> = v.features.iter().map(|f| format!("{f:?}").to_lowercase()).collect();
        let features = if features.is_empty() { "no extensions".to_owned() } else { features.join(", ") };
        writeln!(versions, " *   [{i}] {}: {features}", v.target).expect("a String takes all");
    }
    let weights = match &about.weights_file {
        Some(name) => format!(
            "the contents of the file {name}, mapped or read whole, at an address that is a multiple of 64"
        ),
        None => "qcc_weights, which the library holds".to_owned(),
    };
    write!(
        out,
        "/* A model compiled by qcc, for {arch:?}. Its versions, of which a processor runs the last one that it has all features for:
{versions} *
 * qcc_run computes the outputs from the inputs. All tensors are contiguous and row-major; buffers are the caller's.
 *
 * dims: the named sizes of this run, in this order
{dims} *
 * inputs
{inputs} *
 * outputs
{outputs} *
 * arena: QCC_ARENA_BYTES of working memory at an address that is a multiple of 64; two runs at a time need two
 * weights: {weights}
 * parallel: how to run `kernel` for all units 0..units, in ranges, on any threads; null runs them on this one.
 *   It must return when all are done. `work` is roughly what a unit takes, in nanoseconds. `context` is passed through.
 *
 * Returns 0; or 1 + i where dims[i] is out of its bounds, or -1 where the weights are those of another build, or QCC_NO_VERSION
 * where this processor runs no version: then nothing was written. Or -2 where an index in the inputs is out of range, -3 where a length in them is not the one that the model
 * declares: no memory outside of the buffers was touched, but the outputs are worthless. The result does not depend on how
 * units are divided.
 */
#ifndef QCC_MODEL_H
#define QCC_MODEL_H

#include <stdint.h>

#ifdef __cplusplus
extern \"C\" {{
#endif

#define QCC_NO_VERSION ({none})
#define QCC_ARENA_BYTES UINT64_C({arena})
#define QCC_WEIGHTS_BYTES UINT64_C({bytes})

typedef void (*qcc_kernel)(void *const *buffers, const int64_t *sizes, int64_t begin, int64_t end);
typedef void (*qcc_parallel)(void *context, qcc_kernel kernel, void *const *buffers, const int64_t *sizes,
                             int64_t units, int64_t work);

int32_t qcc_run(const int64_t *dims, const void *const *inputs, void *const *outputs, void *arena,
                const void *weights, qcc_parallel parallel, void *context);

/* The number of the version that qcc_run runs here, or QCC_NO_VERSION. */
int32_t qcc_version(void);

/* What this comment says, as JSON. */
extern const char qcc_model[];
{own}
#ifdef __cplusplus
}}
#endif

#endif
",
        arch = about.arch,
        none = runtime::NO_VERSION,
        arena = about.arena,
        bytes = about.weights,
        own = match about.weights_file {
            Some(_) => "",
            None => "/* The weights. */\nextern const unsigned char qcc_weights[];\n",
        },
    )
    .expect("a String takes all");
    out
}
