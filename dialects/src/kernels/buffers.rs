//! Large buffers that are used again: memory from the system comes as zeroed pages, and zeroing it again for each result
//! took a quarter of the time of a language model's run.
//!
//! The interpreter gives back what nobody reads any more, and the loops that write every element of a result take it. A
//! bounded amount is kept, until the run that gave it is dropped.

use crate::tensor::Data;
use std::any::Any;
use std::sync::{Mutex, PoisonError};

/// Smaller buffers are quick to come by.
const LEAST: usize = 1 << 18;

/// Bytes that are kept.
const MOST: usize = 1 << 27;

/// What is kept: vectors, the latest last, each with its bytes.
static KEPT: Mutex<Vec<(usize, Box<dyn Any + Send>)>> = Mutex::new(Vec::new());

/// A vector of `len` elements, every one of which is to be written: their values are anything.
pub fn take<T: Clone + Default + Send + 'static>(len: usize) -> Vec<T> {
    let bytes = len.saturating_mul(size_of::<T>());
    if bytes < LEAST {
        return vec![T::default(); len];
    }
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    // The smallest that is large enough; a much larger one is left for what needs it.
    let fits =
        |(held, v): &(usize, Box<dyn Any + Send>)| (bytes..=2 * bytes).contains(held) && v.is::<Vec<T>>();
    let found = (0..kept.len()).filter(|&i| fits(&kept[i])).min_by_key(|&i| kept[i].0);
    let found = found.map(|i| kept.swap_remove(i).1);
    drop(kept);
    let Some(mut v) = found.and_then(|v| v.downcast::<Vec<T>>().ok()) else { return vec![T::default(); len] };
    v.resize(len, T::default());
    if cfg!(debug_assertions)
        && let Some(floats) = (&mut *v as &mut dyn Any).downcast_mut::<Vec<f32>>()
    {
        // What is not written shows.
        floats.fill(f32::NAN);
    }
    *v
}

/// Takes back a vector that nobody reads any more.
pub fn give(data: Data) {
    match data {
        Data::F32(v) => keep(v),
        Data::Bool(v) => keep(v),
        _ => {}
    }
}

fn keep<T: Send + 'static>(v: Vec<T>) {
    let bytes = v.capacity() * size_of::<T>();
    if !(LEAST..=MOST / 2).contains(&bytes) {
        return;
    }
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    kept.push((bytes, Box::new(v)));
    while kept.iter().map(|k| k.0).sum::<usize>() > MOST {
        kept.remove(0);
    }
}

/// Frees all that is kept when it is dropped.
pub struct Clear;

impl Drop for Clear {
    fn drop(&mut self) {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests take and give at the same time: only what holds in any case is asked.
    #[test]
    fn what_is_given_is_taken_in_any_length_up_to_its_own() {
        for len in [LEAST, LEAST + 1, LEAST / 4, 5, 0] {
            give(vec![1f32; LEAST].into());
            give(vec![true; LEAST].into());
            assert_eq!(take::<f32>(len).len(), len);
            assert_eq!(take::<bool>(len).len(), len);
            assert_eq!(take::<u64>(len), vec![0; len]);
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        for _ in 0..20 {
            give(vec![1f32; MOST / 16].into());
        }
        let kept = KEPT.lock().unwrap();
        assert!(kept.iter().map(|k| k.0).sum::<usize>() <= MOST);
    }
}
