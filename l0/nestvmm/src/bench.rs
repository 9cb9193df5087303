//! `nestvmm bench`: how fast this is, as ratios against a peer measured in the same run.
//!
//! `bench mix` is a fixed user-mode workload that runs anywhere, on the host and in guests. `bench
//! boot` boots the same kernel and initrd here and under `qemu-system-x86_64 -accel tcg`, runs
//! the mix in both and on the host, and prints the ratios.
//!
//! Not supported: comparing with anything but QEMU's TCG.

use std::fmt::Write as _;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use machine::image;

use crate::cli::BenchBootArgs;
use crate::status::Failure;

/// Kernels and initrds are not larger.
const IMAGE_LIMIT: u64 = 1 << 30;

/// What `/init` prints when L1 is up.
const READY: &str = "nestvmm: L1 ready";
/// What the shell prints before it reads a command.
const PROMPT: &str = "l1:~#";
/// No guest needs longer for any step.
const STEP_LIMIT: Duration = Duration::from_secs(300);

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

/// Runs the mix.
fn mix() -> Vec<Part> {
    vec![timed("integer", integer), timed("sort", sort), timed("memcpy", copy), timed("sha256", sha256)]
}

/// `nestvmm bench mix`: a line per part, `mix NAME MILLISECONDS`.
pub fn print_mix() {
    for p in mix() {
        println!("mix {} {:.3}", p.name, p.ms);
    }
}

/// A line of [`print_mix`].
fn parse_part(line: &str) -> Option<Part> {
    let mut words = line.trim().split(' ');
    (words.next()? == "mix").then_some(())?;
    let name = words.next()?.to_owned();
    let ms = words.next()?.parse().ok()?;
    Some(Part { name, ms })
}

/// Kernel and initrd of an image, as files that both programs take.
struct Payload {
    kernel: PathBuf,
    initrd: PathBuf,
    _dir: tempfile::TempDir,
}

fn payload(path: &Path) -> Result<Payload, Failure> {
    let source = image::open(path, None, IMAGE_LIMIT).map_err(Failure::input)?;
    let Some(initrd) = source.initrd else {
        return Err(Failure::input(format!(
            "{} has no initrd; give an image that `nestvmm image build` made",
            path.display()
        )));
    };
    let temporary = |e: std::io::Error| Failure::host(format!("can't write a temporary file: {e}"));
    let dir = tempfile::tempdir().map_err(temporary)?;
    let write = |name: &str, bytes: &[u8]| {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).map_err(temporary).map(|()| file)
    };
    Ok(Payload {
        kernel: write("kernel", &source.kernel.data)?,
        initrd: write("initrd", &initrd.data)?,
        _dir: dir,
    })
}

/// What one guest showed.
#[derive(Debug)]
struct Measured {
    /// Seconds from the program's start to the guest's init.
    init: f64,
    mix: Vec<Part>,
    /// The program's own last words.
    report: String,
}

fn failure(message: impl Into<String>) -> Failure {
    Failure::host(message.into())
}

/// A guest on pipes; killed when dropped.
struct Guest {
    child: Child,
    start: Instant,
    lines: std::sync::mpsc::Receiver<String>,
    seen: String,
}

impl Guest {
    fn spawn(mut command: Command) -> Result<Self, Failure> {
        let program = command.get_program().to_owned();
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| failure(format!("can't start {}: {e}", program.display())))?;
        let (sender, lines) = std::sync::mpsc::channel();
        if let Some(out) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut out = BufReader::new(out);
                // By pieces, not lines: a prompt has no end of line.
                loop {
                    let Ok(piece) = out.fill_buf() else { return };
                    let n = piece.len();
                    if n == 0 || sender.send(String::from_utf8_lossy(piece).into_owned()).is_err() {
                        return;
                    }
                    out.consume(n);
                }
            });
        }
        Ok(Self { child, start, lines, seen: String::new() })
    }

    /// Waits until `text` appears in what has not been looked at; returns all up to it.
    fn wait_for(&mut self, text: &str) -> Result<String, Failure> {
        let deadline = Instant::now() + STEP_LIMIT;
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.seen, rest));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(piece) => self.seen.push_str(&piece),
                Err(_) => {
                    let tail: String = self.seen.chars().rev().take(400).collect();
                    let tail: String = tail.chars().rev().collect();
                    return Err(failure(format!(
                        "the guest never printed {text:?}; its last output: {tail:?}"
                    )));
                }
            }
        }
    }

    fn type_line(&mut self, line: &str) -> Result<(), Failure> {
        let Some(stdin) = self.child.stdin.as_mut() else { return Err(failure("the guest has no input")) };
        writeln!(stdin, "{line}").map_err(|e| failure(format!("can't type to the guest: {e}")))
    }

    /// Boots, runs the mix, powers off.
    fn measure(mut self) -> Result<Measured, Failure> {
        self.wait_for(READY)?;
        let init = self.start.elapsed().as_secs_f64();
        self.wait_for(PROMPT)?;
        self.type_line("nestvmm bench mix; echo mix-$((1+1))")?;
        let output = self.wait_for("mix-2")?;
        let mix = output.lines().filter_map(parse_part).collect();
        self.type_line("poweroff -f")?;
        let mut report = String::new();
        if let Some(mut err) = self.child.stderr.take() {
            // Ends when the program does.
            let _ = err.read_to_string(&mut report);
        }
        let _ = self.child.wait();
        Ok(Measured { init, mix, report })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn own_command(b: &Payload) -> Result<Command, Failure> {
    let exe = std::env::current_exe().map_err(|e| failure(format!("can't find this program: {e}")))?;
    let mut c = Command::new(exe);
    c.args(["run", "--engine", "soft", "--exit-stats", "--memory", "1G", "--append", "console=ttyS0 quiet"]);
    c.arg("--kernel").arg(&b.kernel).arg("--initrd").arg(&b.initrd);
    Ok(c)
}

fn qemu_command(qemu: &Path, b: &Payload) -> Command {
    let mut c = Command::new(qemu);
    c.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        "1",
        "-m",
        "1G",
        "-nographic",
        "-nodefaults",
        "-no-reboot",
    ]);
    c.args(["-serial", "stdio", "-append", "console=ttyS0 quiet"]);
    c.arg("-kernel").arg(&b.kernel).arg("-initrd").arg(&b.initrd);
    c
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn part_median(all: &[Vec<Part>], name: &str) -> f64 {
    median(all.iter().flatten().filter(|p| p.name == name).map(|p| p.ms).collect())
}

/// `nestvmm bench boot`.
///
/// # Errors
/// [`Failure`] when the image can't be used, QEMU can't be started, or a guest does not come up.
pub fn boot(args: &BenchBootArgs) -> Result<(), Failure> {
    let payload = payload(&args.image)?;
    let runs = args.runs.max(1);
    let (mut ours, mut theirs, mut native) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..runs {
        eprintln!("run {} of {runs}: nestvmm, QEMU (TCG), host", n + 1);
        ours.push(Guest::spawn(own_command(&payload)?)?.measure()?);
        theirs.push(Guest::spawn(qemu_command(&args.qemu, &payload))?.measure()?);
        native.push(mix());
    }
    print!("{}", table(&ours, &theirs, &native));
    if let Some(last) = ours.last() {
        println!("\nnestvmm's own report of its last run:\n{}", last.report.trim_end());
    }
    Ok(())
}

/// The comparison: medians and ratios.
fn table(ours: &[Measured], theirs: &[Measured], native: &[Vec<Part>]) -> String {
    let mut out = String::new();
    let mixes = |m: &[Measured]| m.iter().map(|m| m.mix.clone()).collect::<Vec<_>>();
    let inits = |m: &[Measured]| median(m.iter().map(|m| m.init * 1e3).collect());
    let _ = writeln!(
        out,
        "{:<14}{:>12}{:>12}{:>12}{:>14}{:>16}",
        "median ms", "nestvmm", "TCG", "host", "nestvmm/TCG", "nestvmm/host"
    );
    let (a, t) = (inits(ours), inits(theirs));
    let _ = writeln!(out, "{:<14}{a:>12.1}{t:>12.1}{:>12}{:>14.2}{:>16}", "boot to init", "-", a / t, "-");
    let (ours, theirs) = (mixes(ours), mixes(theirs));
    for name in ["integer", "sort", "memcpy", "sha256"] {
        let (a, t, h) = (part_median(&ours, name), part_median(&theirs, name), part_median(native, name));
        let _ = writeln!(out, "{name:<14}{a:>12.1}{t:>12.1}{h:>12.1}{:>14.2}{:>16.2}", a / t, a / h);
    }
    out
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

    #[test]
    fn ratios_are_of_medians() {
        let m = |init: f64, ms: f64| Measured {
            init,
            mix: vec![Part { name: "sort".into(), ms }],
            report: String::new(),
        };
        let ours = [m(2.0, 20.0), m(9.0, 90.0), m(1.0, 10.0)];
        let theirs = [m(1.0, 10.0)];
        let native = [vec![Part { name: "sort".into(), ms: 2.0 }]];
        let t = table(&ours, &theirs, &native);
        let boot = t.lines().find(|l| l.starts_with("boot")).unwrap();
        assert!(boot.contains("2.00"), "{boot}");
        let sort = t.lines().find(|l| l.starts_with("sort")).unwrap();
        assert!(sort.trim_end().ends_with("10.00"), "{sort}");
    }
}
