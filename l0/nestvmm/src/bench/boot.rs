//! `nestvmm bench boot`: boots the same kernel and initrd here and under `qemu-system-x86_64 -accel tcg`, runs
//! the mix in both and on the host, and prints the ratios.

use std::fmt::Write as _;

use super::median;
use super::mix::{self, Part, parse_part};
use super::peer::{Guest, PROMPT, Payload, READY};
use crate::cli::BenchBootArgs;
use crate::interrupt;
use crate::status::Failure;

/// What one guest showed.
#[derive(Debug)]
struct Measured {
    /// Seconds from the program's start to the guest's init.
    init: f64,
    mix: Vec<Part>,
    /// The program's own last words.
    report: String,
}

/// Boots, runs the mix, powers off.
fn measure(mut guest: Guest) -> Result<Measured, Failure> {
    let init = guest.wait_for(READY)?.1.as_secs_f64();
    guest.wait_for(PROMPT)?;
    guest.type_line("nestvmm bench mix; echo mix-$((1+1))")?;
    let (output, _) = guest.wait_for("mix-2")?;
    let mix = output.lines().filter_map(parse_part).collect();
    let report = guest.power_off()?;
    Ok(Measured { init, mix, report })
}

fn part_median(all: &[Vec<Part>], name: &str) -> f64 {
    median(all.iter().flatten().filter(|p| p.name == name).map(|p| p.ms).collect())
}

/// Boots an image here and under TCG, `args.runs` times each.
///
/// # Errors
/// [`Failure`] when the image can't be used, QEMU can't be started, or a guest does not come up.
pub fn boot(args: &BenchBootArgs) -> Result<(), Failure> {
    interrupt::handle_signals()?;
    let payload = Payload::open(&args.image)?;
    let runs = args.runs.max(1);
    let (mut ours, mut theirs, mut native) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..runs {
        eprintln!("run {} of {runs}: nestvmm, QEMU (TCG), host", n + 1);
        ours.push(measure(Guest::spawn(&payload.own_launch()?)?)?);
        theirs.push(measure(Guest::spawn(&payload.qemu_launch(&args.qemu))?)?);
        native.push(mix::run());
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
