//! A fixed user-mode workload that runs anywhere, on the host and in guests.

use std::hint::black_box;
use std::time::Instant;

/// One part of the mix: its name and how long it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Name.
    pub name: String,
    /// Time in milliseconds.
    pub ms: f64,
}

fn timed(name: &str, f: impl FnOnce()) -> Part {
    let start = Instant::now();
    f();
    Part { name: name.into(), ms: start.elapsed().as_secs_f64() * 1e3 }
}

/// Integer arithmetic with branches that depend on it: the 3n+1 sequence.
fn integer() {
    let mut longest = 0u32;
    for start in 1..60_000u64 {
        let (mut n, mut steps) = (start, 0u32);
        while n != 1 {
            n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };
            steps += 1;
        }
        longest = longest.max(steps);
    }
    black_box(longest);
}

/// Sorts pseudo-random numbers.
fn sort() {
    let mut x = 0x2545_f491_4f6c_dd1du64;
    let mut v: Vec<u64> = (0..300_000)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        })
        .collect();
    v.sort();
    black_box(&v);
}

/// Copies 128 KiB again and again: with ERMS, the C library's REP MOVSB.
fn copy() {
    let from = vec![0x5au8; 128 << 10];
    let mut to = vec![0u8; 128 << 10];
    for _ in 0..8000 {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    }
}

/// SHA-256 round constants (FIPS 180-4 §4.2.2), computed: the fractional parts of the cube roots of
/// the first 64 primes.
fn sha256_constants() -> [u32; 64] {
    let mut k = [0; 64];
    let mut n = 1u128;
    for slot in &mut k {
        n += 1;
        while (2..n).any(|d| n.is_multiple_of(d)) {
            n += 1;
        }
        // floor(cbrt(n) * 2^32), by bisection on integers.
        let target = n << 96;
        let (mut low, mut high) = (0u128, 1u128 << 36);
        while high - low > 1 {
            let mid = (low + high) / 2;
            if mid * mid * mid <= target { low = mid } else { high = mid }
        }
        *slot = low as u32;
    }
    k
}

/// The compression function of SHA-256 (FIPS 180-4 §6.2.2) over 8 MiB of a fixed pattern: plain
/// integer code on every machine, whatever SHA instructions it has.
fn sha256() {
    let k = sha256_constants();
    let mut h = [
        0x6a09_e667u32,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    for block in 0..(8u32 << 20) / 64 {
        let mut w = [0u32; 64];
        for (i, word) in w[..16].iter_mut().enumerate() {
            *word = block.wrapping_mul(0x9e37_79b9) ^ i as u32;
        }
        for i in 16..64 {
            let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ w[i - 15] >> 3;
            let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16].wrapping_add(s0).wrapping_add(w[i - 7]).wrapping_add(s1);
        }
        let mut v = h;
        for (ki, wi) in k.iter().zip(&w) {
            let [a, b, c, d, e, f, g, hh] = v;
            let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
            let t1 = hh.wrapping_add(s1).wrapping_add(e & f ^ !e & g).wrapping_add(*ki).wrapping_add(*wi);
            let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
            let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
            v = [t1.wrapping_add(t2), a, b, c, d.wrapping_add(t1), e, f, g];
        }
        h.iter_mut().zip(v).for_each(|(a, b)| *a = a.wrapping_add(b));
    }
    black_box(h);
}

/// Runs all parts.
pub fn run() -> Vec<Part> {
    vec![timed("integer", integer), timed("sort", sort), timed("memcpy", copy), timed("sha256", sha256)]
}

/// `nestvmm bench mix`: a line per part, `mix NAME MILLISECONDS`.
pub fn print() {
    for p in run() {
        println!("mix {} {:.3}", p.name, p.ms);
    }
}

/// A line of [`print`].
pub fn parse_part(line: &str) -> Option<Part> {
    let mut words = line.trim().split(' ');
    (words.next()? == "mix").then_some(())?;
    let name = words.next()?.to_owned();
    let ms = words.next()?.parse().ok()?;
    Some(Part { name, ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_those_of_the_standard() {
        let k = sha256_constants();
        assert_eq!(k[..4], [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5]);
        assert_eq!(k[63], 0xc671_78f2);
    }

    #[test]
    fn parts_are_read_back() {
        let p = parse_part("mix sort 12.500\r").unwrap();
        assert_eq!(p, Part { name: "sort".into(), ms: 12.5 });
        assert_eq!(parse_part("l1:~# nestvmm bench mix"), None);
        assert_eq!(parse_part("mix"), None);
    }
}
