//! Instructions that kernels ask for by name, and what stands in for them on other machines, against what their manuals
//! say, element by element.

use crate::harness::{emulated, load, targets};
use codegen::Target;
use codegen::kernels::Kernel;
use codegen::text::{Intrinsic, Val};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Elements of these bytes as the manual reads them.
fn signed(bytes: &[u8], size: usize) -> Vec<i64> {
    let one = |b: &[u8]| b.iter().rev().fold(0i64, |v, &b| v << 8 | i64::from(b));
    let shift = 64 - 8 * size as u32;
    bytes.chunks(size).map(|b| one(b) << shift >> shift).collect()
}

fn unsigned(bytes: &[u8]) -> Vec<i64> {
    bytes.iter().map(|&b| b.into()).collect()
}

/// The low bytes of each.
fn packed(values: impl IntoIterator<Item = i64>, size: usize) -> Vec<u8> {
    values.into_iter().flat_map(|v| v.to_le_bytes()[..size].to_vec()).collect()
}

/// Sums of so many products that lie side by side.
fn dot(x: &[i64], y: &[i64], count: usize) -> Vec<i64> {
    let one = |(x, y): (&[i64], &[i64])| x.iter().zip(y).map(|(x, y)| x * y).sum();
    x.chunks(count).zip(y.chunks(count)).map(one).collect()
}

fn manual(which: Intrinsic, args: &[Vec<u8>]) -> Vec<u8> {
    let added = |sums: Vec<i64>| packed(signed(&args[0], 4).iter().zip(sums).map(|(a, s)| a + s), 4);
    match which {
        Intrinsic::Pmaddubsw => {
            let sums = dot(&unsigned(&args[0]), &signed(&args[1], 1), 2);
            packed(sums.into_iter().map(|s| s.clamp(-32768, 32767)), 2)
        }
        Intrinsic::Pmaddwd => packed(dot(&signed(&args[0], 2), &signed(&args[1], 2), 2), 4),
        Intrinsic::Psignb => {
            let pairs = signed(&args[0], 1).into_iter().zip(signed(&args[1], 1));
            packed(pairs.map(|(x, sign)| x * sign.signum()), 1)
        }
        Intrinsic::Vpdpbusd | Intrinsic::Usdot => added(dot(&unsigned(&args[1]), &signed(&args[2], 1), 4)),
        Intrinsic::Vpdpwssd => added(dot(&signed(&args[1], 2), &signed(&args[2], 2), 2)),
        Intrinsic::Sdot => added(dot(&signed(&args[1], 1), &signed(&args[2], 1), 4)),
        Intrinsic::Usmmla => {
            let (x, y) = (unsigned(&args[1]), signed(&args[2], 1));
            let cells = [(0, 0), (0, 1), (1, 0), (1, 1)];
            added(cells.iter().map(|(i, j)| dot(&x[8 * i..][..8], &y[8 * j..][..8], 8)[0]).collect())
        }
    }
}

/// The instruction on registers that lie behind each other.
fn kernel(target: &Target, which: Intrinsic, bytes: usize) -> Kernel {
    let (takes, gives) = which.types(bytes);
    Kernel::new(target, "instruction", |b, a| {
        let registers: Vec<Val> = (0..=takes.len()).map(|i| a.buffer(b, i)).collect();
        b.each(a.begin, a.end, 1, |b, i| {
            let width = b.size(bytes);
            let at = b.mul(i, width);
            let registers: Vec<Val> = registers.iter().map(|&r| b.at(r, at)).collect();
            let args: Vec<Val> = takes.iter().zip(&registers).map(|(&ty, &r)| b.load(r, ty)).collect();
            let y = b.intrinsic(which, &args, gives);
            b.store(y, registers[takes.len()]);
        });
    })
}

#[test]
fn instructions_do_what_their_manuals_say() {
    use Intrinsic::{Pmaddubsw, Pmaddwd, Psignb, Sdot, Usdot, Usmmla, Vpdpbusd, Vpdpwssd};
    let of = |name: &str| -> Vec<(Intrinsic, usize)> {
        let avx2 = [(Pmaddwd, 16), (Pmaddubsw, 32), (Pmaddwd, 32), (Psignb, 32)];
        let avx512 = [(Pmaddubsw, 64), (Pmaddwd, 64)];
        match name.split(' ').next().unwrap() {
            "x86-64" => vec![(Pmaddwd, 16)],
            "x86-64-v3" => avx2.to_vec(),
            "x86-64-v4" => [&avx2[..], &avx512].concat(),
            "avx512-vnni" | "sapphire-rapids" => {
                [&avx2[..], &avx512, &[(Vpdpbusd, 64), (Vpdpwssd, 64)]].concat()
            }
            "aarch64" => Vec::new(),
            "aarch64-dotprod" => vec![(Sdot, 16)],
            "aarch64-i8mm" => vec![(Sdot, 16), (Usdot, 16), (Usmmla, 16)],
            other => panic!("{other}: a new target, whose instructions this list must name"),
        }
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let all = ["x86-64-v3", "avx512-vnni", "aarch64-i8mm"];
    for target in targets().into_iter().chain(emulated(&all)) {
        let forms = of(&target.name);
        let kernels: Vec<Kernel> =
            forms.iter().map(|&(which, bytes)| kernel(&target, which, bytes)).collect();
        if kernels.is_empty() {
            continue;
        }
        let loaded = load(&target, &kernels.iter().collect::<Vec<_>>());
        for (i, &(which, bytes)) in forms.iter().enumerate() {
            const REGISTERS: usize = 50;
            let extreme = [0x00, 0x01, 0x7f, 0x80, 0x81, 0xff];
            let mut byte = |r: usize| match r % 2 {
                0 => rng.random(),
                _ => extreme[rng.random_range(0..extreme.len())],
            };
            let count = which.types(bytes).0.len();
            let mut args: Vec<Vec<u8>> =
                (0..count).map(|_| (0..REGISTERS * bytes).map(|j| byte(j / bytes)).collect()).collect();
            let mut found = vec![0xa5u8; REGISTERS * bytes];
            let mut buffers: Vec<*mut u8> = args.iter_mut().map(|a| a.as_mut_ptr()).collect();
            buffers.push(found.as_mut_ptr());
            loaded.call(i, &buffers, &[], REGISTERS);
            for r in 0..REGISTERS {
                let own: Vec<Vec<u8>> = args.iter().map(|a| a[r * bytes..][..bytes].to_vec()).collect();
                let expected = manual(which, &own);
                assert_eq!(found[r * bytes..][..bytes], expected, "{target}: {which:?} of {own:?}");
            }
        }
    }
}
