//! What a language model's inputs are fed with: tokens, and whatever follows from them.
//!
//! An input is recognized by its name and its type. A key/value cache is fed empty; where its length is fixed, as zeros
//! that the attention mask leaves out, so that a row of tokens gives what it gives without a cache.

use super::lm::LmError;
use dialects::ir::{Dim, Elem, Module, Symbol, Value};
use dialects::tensor::Tensor;

/// A cache has at most this many elements in a row of tokens.
const MAX_CACHE: usize = 1 << 28;

/// What an input's elements are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    /// The tokens.
    Tokens,
    /// Ones: every token counts, and nothing of a cache.
    Ones,
    /// 0, 1, 2, ... along the row.
    Positions,
    /// Zeros: one segment.
    Zeros,
    /// One element, zero: a switch that is off, or a count of nothing.
    Off,
    /// The number of positions in the cache.
    Past,
    /// Whether there is anything in the cache.
    Branch,
    /// The last position of each row.
    Last,
    /// The number of positions of the longest row.
    Length,
}

/// An input known by its name: what fills it, in words, and the ranks that it may have.
struct Known {
    name: &'static str,
    fill: Fill,
    words: &'static str,
    ranks: &'static [usize],
}

const fn known(name: &'static str, fill: Fill, words: &'static str, ranks: &'static [usize]) -> Known {
    Known { name, fill, words, ranks }
}

const KNOWN: &[Known] = &[
    known("input_ids", Fill::Tokens, "the tokens", &[2]),
    known("attention_mask", Fill::Ones, "ones", &[2]),
    known("position_ids", Fill::Positions, "0, 1, 2, ...", &[2]),
    known("cache_position", Fill::Positions, "0, 1, 2, ...", &[1]),
    known("token_type_ids", Fill::Zeros, "zeros", &[2]),
    known("seqlens_k", Fill::Last, "the last position", &[1, 2]),
    known("total_sequence_length", Fill::Length, "the number of tokens", &[0, 1]),
    known("total_seq_len", Fill::Length, "the number of tokens", &[0, 1]),
    known("past_sequence_length", Fill::Past, "0", &[0, 1]),
    known("use_cache_branch", Fill::Branch, "false", &[0, 1]),
    known("num_logits_to_keep", Fill::Off, "0", &[0, 1]),
    known("logits_to_keep", Fill::Off, "0", &[0, 1]),
];

/// The names of inputs that are recognized, for messages.
pub fn known_names() -> String {
    let names: Vec<&str> = KNOWN.iter().map(|k| k.name).collect();
    format!("{} and past keys and values", names.join(", "))
}

/// How one input is fed.
#[derive(Clone, Debug)]
enum Kind {
    Known(Fill),
    /// A cache: its dims, where `None` is the batch, and the one along which positions lie.
    Cache {
        dims: Vec<Option<usize>>,
        past: usize,
    },
}

/// One input of a language model.
#[derive(Clone, Debug)]
pub struct Feed {
    name: Symbol,
    elem: Elem,
    rank: usize,
    kind: Kind,
}

/// Whether a name is one that exporters give to a cache of keys and values: `past_key_values.0.key`, `past_0`,
/// `past_key_0`, `key_cache.0`, `k_cache_0`.
fn names_cache(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let word = |w: &str| name.split(|c: char| !c.is_ascii_alphabetic()).any(|part| part == w);
    word("past") || word("cache") && (word("key") || word("value") || word("k") || word("v") || word("kv"))
}

impl Feed {
    /// Recognizes an input.
    pub fn of(m: &Module, v: Value) -> Result<Feed, LmError> {
        let data = &m.values[v];
        let (name, ty) = (data.name.clone(), data.ty.clone());
        let unknown = || LmError::Input { name: name.clone(), ty: ty.clone() };
        let elem = ty.elem().ok_or_else(unknown)?;
        let Some(known) = KNOWN.iter().find(|k| *k.name == *name) else {
            return match names_cache(&name) {
                true => cache(m, v).ok_or_else(|| LmError::Cache { name: name.clone(), ty: ty.clone() }),
                false => Err(unknown()),
            };
        };
        let rank = ty.dims().map_or(known.ranks[0], <[Dim]>::len);
        let legal = match elem {
            Elem::I64 | Elem::I32 => true,
            Elem::Bool => matches!(known.fill, Fill::Ones | Fill::Off | Fill::Branch),
            Elem::F32 | Elem::F16 | Elem::BF16 => known.fill == Fill::Ones,
            _ => false,
        };
        match legal && known.ranks.contains(&rank) {
            true => Ok(Feed { name, elem, rank, kind: Kind::Known(known.fill) }),
            false => Err(unknown()),
        }
    }

    /// The input's name.
    pub fn name(&self) -> &Symbol {
        &self.name
    }

    /// The positions that a cache has whatever is fed; `None` for an input that is no cache.
    pub fn past(&self) -> Option<usize> {
        match &self.kind {
            Kind::Cache { dims, past } => Some(dims[*past].unwrap_or(0)),
            Kind::Known(_) => None,
        }
    }

    /// Whether the input tells a model which positions count.
    pub fn masks(&self) -> bool {
        matches!(self.kind, Kind::Known(Fill::Ones | Fill::Last))
    }

    /// The tensor for one row of tokens behind `start` others that were fed before; `None` for a cache, which goes on from
    /// what the model gave.
    pub fn after(&self, ids: &[i64], start: usize) -> Option<Tensor> {
        let Kind::Known(fill) = &self.kind else { return None };
        let (new, total) = (ids.len(), start + ids.len());
        let row = |values: Vec<i64>| ([1, values.len()][2 - self.rank..].to_vec(), values);
        let single = |value: usize| (vec![1; self.rank], vec![value as i64]);
        let (shape, values) = match fill {
            Fill::Tokens => row(ids.to_vec()),
            Fill::Ones => row(vec![1; total]),
            Fill::Positions => row((start as i64..total as i64).collect()),
            Fill::Zeros => row(vec![0; new]),
            Fill::Past => single(start),
            Fill::Branch => single((start > 0).into()),
            Fill::Off => single(0),
            Fill::Length => single(total),
            Fill::Last => single(total - 1),
        };
        Some(cast(self.elem, &shape, values))
    }

    /// The tensor for rows of `len` tokens, row after row in `ids`, behind a cache of `past` positions that do not count.
    pub fn tensor(&self, ids: &[i64], len: usize, past: usize) -> Tensor {
        let rows = ids.len() / len;
        let fill = match &self.kind {
            Kind::Cache { dims, .. } => {
                let shape: Vec<usize> = dims.iter().map(|d| d.unwrap_or(rows)).collect();
                let count = shape.iter().product();
                return Tensor::from_f32(self.elem, &shape, vec![0.0; count])
                    .expect("the element type and the size were checked when the model was recognized");
            }
            Kind::Known(fill) => *fill,
        };
        let along = |n: usize, value: &dyn Fn(usize) -> i64| -> (Vec<usize>, Vec<i64>) {
            let shape = if self.rank == 1 { vec![n] } else { vec![rows, n] };
            let count: usize = shape.iter().product();
            (shape, (0..count).map(|i| value(i % n.max(1))).collect())
        };
        let single = |value: i64| (vec![1; self.rank], vec![value]);
        let (shape, values) = match fill {
            Fill::Tokens => (vec![rows, len], ids.to_vec()),
            Fill::Ones => along(past + len, &|i| (i >= past).into()),
            Fill::Positions => along(len, &|i| i as i64),
            Fill::Zeros => along(len, &|_| 0),
            Fill::Off | Fill::Past | Fill::Branch => single(0),
            Fill::Length => single(len as i64),
            Fill::Last => ([rows, 1][..self.rank].to_vec(), vec![len as i64 - 1; rows]),
        };
        cast(self.elem, &shape, values)
    }
}

/// What is fed beside the tokens, in words; `None` when nothing is.
pub fn in_words(feeds: &[Feed], past: usize) -> Option<String> {
    let plain = |f: &Feed| match &f.kind {
        Kind::Known(Fill::Tokens) | Kind::Cache { .. } => None,
        Kind::Known(Fill::Ones) if past > 0 => Some(format!("{} with {past} zeros, then ones", f.name)),
        Kind::Known(_) => {
            let known = KNOWN.iter().find(|k| *k.name == *f.name)?;
            Some(format!("{} with {}", f.name, known.words))
        }
    };
    let caches: Vec<&Feed> = feeds.iter().filter(|f| f.past().is_some()).collect();
    let cache = caches.first().map(|first| {
        let what = match past {
            0 => "an empty key/value cache".to_string(),
            n => format!("a key/value cache of {n} positions, all zero"),
        };
        format!("{what} ({:?} and {} more)", first.name, caches.len() - 1)
    });
    let list: Vec<String> = feeds.iter().filter_map(plain).chain(cache).collect();
    (!list.is_empty()).then(|| format!("fed {}", list.join(", ")))
}

/// A cache `[batch, heads, past, size]`, or keys and values in one, `[2, batch, heads, past, size]`. Positions lie along
/// the first dim behind the batch that is not fixed (`[batch, past, heads, size]` is another order), or else along
/// the last but one.
fn cache(m: &Module, v: Value) -> Option<Feed> {
    let data = &m.values[v];
    let (elem, dims) = (data.ty.elem()?, data.ty.dims()?);
    let rank = dims.len();
    let size = |d: &Dim| d.known().and_then(|n| usize::try_from(n).ok());
    let pair = rank == 5 && size(&dims[0]) == Some(2);
    if !(rank == 4 || pair) || !matches!(elem, Elem::F32 | Elem::F16 | Elem::BF16) {
        return None;
    }
    let batch = rank - 4;
    let open: Vec<usize> = (batch + 1..rank).filter(|&i| size(&dims[i]).is_none()).collect();
    let past = match open[..] {
        [] => rank - 2,
        [one] if one < rank - 1 => one,
        _ => return None,
    };
    let dim = |(i, d): (usize, &Dim)| match i {
        _ if i == batch => None,
        _ if i == past => Some(size(d).unwrap_or(0)),
        _ => size(d),
    };
    let dims: Vec<Option<usize>> = dims.iter().enumerate().map(dim).collect();
    let row = dims.iter().flatten().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    (row <= MAX_CACHE).then(|| Feed { name: data.name.clone(), elem, rank, kind: Kind::Cache { dims, past } })
}

fn cast(elem: Elem, shape: &[usize], values: Vec<i64>) -> Tensor {
    let made = match elem {
        Elem::I64 => Tensor::new(shape, values),
        Elem::I32 => Tensor::new(shape, values.iter().map(|&v| v as i32).collect::<Vec<_>>()),
        Elem::Bool => Tensor::new(shape, values.iter().map(|&v| v != 0).collect::<Vec<_>>()),
        _ => Tensor::from_f32(elem, shape, values.iter().map(|&v| v as f32).collect()),
    };
    made.expect("the element type was checked when the model was recognized")
}

#[cfg(test)]
mod tests {
    use super::*;
    use dialects::ir::Type;

    fn feed(name: &str, elem: Elem, dims: &[Dim]) -> Result<Feed, LmError> {
        let mut m = Module::default();
        let top = m.top;
        let v = m.add_arg(top, name, Type::tensor(elem, dims.iter().cloned()));
        Feed::of(&m, v)
    }

    fn sym(name: &str) -> Dim {
        Dim::Sym(name.into())
    }

    #[test]
    fn caches_are_told_by_their_names() {
        for name in [
            "past_key_values.0.key",
            "past_key_values.11.decoder.value",
            "past_key_0",
            "past_value_self_3",
            "past_2",
            "key_cache.4",
            "k_cache_0",
            "cache_v.1",
            "kv_cache",
        ] {
            assert!(names_cache(name), "{name}");
        }
        for name in ["input_ids", "cache_position", "use_cache_branch", "repast", "keys", "passed"] {
            assert!(!names_cache(name), "{name}");
        }
    }

    #[test]
    fn a_cache_is_fed_empty_or_as_zeros() {
        let (b, p, ids) = (sym("b"), sym("past"), [5, 6, 7, 8, 9, 10]);
        let shape =
            |dims: &[Dim]| feed("past_0", Elem::F16, dims).unwrap().tensor(&ids, 3, 0).shape().to_vec();
        let (two, four) = (Dim::Known(2), Dim::Known(4));
        assert_eq!(shape(&[b.clone(), two.clone(), p.clone(), four.clone()]), [2, 2, 0, 4]);
        assert_eq!(shape(&[b.clone(), p.clone(), two.clone(), four.clone()]), [2, 0, 2, 4]);
        assert_eq!(shape(&[two.clone(), b.clone(), two.clone(), p.clone(), four.clone()]), [2, 2, 2, 0, 4]);
        assert_eq!(shape(&[b.clone(), two.clone(), Dim::Known(7), four.clone()]), [2, 2, 7, 4]);
        // Neither heads nor size can be guessed, nor integers in a cache.
        assert!(feed("past_0", Elem::F32, &[b.clone(), sym("h"), p.clone(), four.clone()]).is_err());
        assert!(feed("past_0", Elem::F32, &[b.clone(), two.clone(), p.clone(), sym("d")]).is_err());
        assert!(feed("past_0", Elem::I64, &[b.clone(), two.clone(), p.clone(), four.clone()]).is_err());
        assert!(feed("past_0", Elem::F32, &[b, p, four]).is_err());
        let huge = [sym("b"), Dim::Known(1 << 40), sym("p"), Dim::Known(1 << 40)];
        assert!(feed("past_0", Elem::F32, &huge).is_ok());
        let huge = [sym("b"), Dim::Known(1 << 20), Dim::Known(1 << 20), Dim::Known(64)];
        assert!(feed("past_0", Elem::F32, &huge).is_err());
    }

    #[test]
    fn lengths_and_masks_behind_a_cache() {
        let ids = [5, 6, 7, 8, 9, 10];
        let tensor = |name: &str, elem: Elem, rank: usize, past: usize| {
            let dims: Vec<Dim> = (0..rank).map(|i| sym(&i.to_string())).collect();
            feed(name, elem, &dims).unwrap().tensor(&ids, 3, past)
        };
        let mask = Tensor::new(&[2, 5], vec![0i64, 0, 1, 1, 1, 0, 0, 1, 1, 1]).unwrap();
        assert_eq!(tensor("attention_mask", Elem::I64, 2, 2), mask);
        assert_eq!(tensor("cache_position", Elem::I64, 1, 2), Tensor::new(&[3], vec![0i64, 1, 2]).unwrap());
        assert_eq!(tensor("seqlens_k", Elem::I32, 1, 0), Tensor::new(&[2], vec![2i32, 2]).unwrap());
        assert_eq!(tensor("seqlens_k", Elem::I32, 2, 0), Tensor::new(&[2, 1], vec![2i32, 2]).unwrap());
        assert_eq!(tensor("total_sequence_length", Elem::I32, 0, 0), Tensor::scalar(3i32));
        assert_eq!(tensor("use_cache_branch", Elem::Bool, 1, 0), Tensor::new(&[1], vec![false]).unwrap());
        assert!(feed("cache_position", Elem::I64, &[sym("a"), sym("b")]).is_err());
        assert!(feed("position_ids", Elem::F32, &[sym("a"), sym("b")]).is_err());
    }

    #[test]
    fn tokens_behind_others() {
        let tensor = |name: &str, elem: Elem, rank: usize| {
            let dims: Vec<Dim> = (0..rank).map(|i| sym(&i.to_string())).collect();
            feed(name, elem, &dims).unwrap().after(&[5, 6], 3).unwrap()
        };
        let row = |values: &[i64]| Tensor::new(&[1, values.len()], values.to_vec()).unwrap();
        assert_eq!(tensor("input_ids", Elem::I64, 2), row(&[5, 6]));
        assert_eq!(tensor("attention_mask", Elem::I64, 2), row(&[1; 5]));
        assert_eq!(tensor("position_ids", Elem::I64, 2), row(&[3, 4]));
        assert_eq!(tensor("token_type_ids", Elem::I64, 2), row(&[0, 0]));
        assert_eq!(tensor("cache_position", Elem::I64, 1), Tensor::new(&[2], vec![3i64, 4]).unwrap());
        assert_eq!(tensor("seqlens_k", Elem::I32, 1), Tensor::new(&[1], vec![4i32]).unwrap());
        assert_eq!(tensor("total_sequence_length", Elem::I32, 0), Tensor::scalar(5i32));
        assert_eq!(tensor("past_sequence_length", Elem::I64, 1), Tensor::new(&[1], vec![3i64]).unwrap());
        assert_eq!(tensor("use_cache_branch", Elem::Bool, 1), Tensor::new(&[1], vec![true]).unwrap());
        assert_eq!(tensor("logits_to_keep", Elem::I64, 0), Tensor::scalar(0i64));
        let cache = [sym("b"), Dim::Known(2), sym("p"), Dim::Known(4)];
        assert!(feed("past_0", Elem::F32, &cache).unwrap().after(&[5], 3).is_none());
    }

    #[test]
    fn what_is_fed_is_said() {
        let cache = |p: Dim| feed("past_0", Elem::F32, &[sym("b"), Dim::Known(2), p, Dim::Known(4)]).unwrap();
        let mask = feed("attention_mask", Elem::I64, &[sym("b"), sym("s")]).unwrap();
        assert_eq!(in_words(&[], 0), None);
        let said = in_words(&[mask.clone(), cache(sym("p"))], 0).unwrap();
        assert_eq!(said, "fed attention_mask with ones, an empty key/value cache (\"past_0\" and 0 more)");
        let said = in_words(&[mask, cache(Dim::Known(7)), cache(Dim::Known(7))], 7).unwrap();
        assert!(said.contains("7 zeros, then ones") && said.contains("of 7 positions, all zero"), "{said}");
    }
}
