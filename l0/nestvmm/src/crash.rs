//! Prints what is known about a guest that crashed.

use hypervisor::CrashReport;
use hypervisor::report::CodeBytes;
use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

/// At most this many instructions are shown.
const INSTRUCTIONS: usize = 12;

/// The whole report: cause, registers, last exits, disassembly at RIP.
pub fn render(report: &CrashReport) -> String {
    format!("{report}{}", disassemble(&report.code))
}

fn disassemble(code: &CodeBytes) -> String {
    if code.bytes.is_empty() {
        return format!("code at {:#x}: not mapped to memory\n", code.linear);
    }
    let mut decoder = Decoder::with_ip(code.bitness, &code.bytes, code.linear, DecoderOptions::NONE);
    let mut formatter = NasmFormatter::new();
    let mut out = format!("code at {:#x} ({}-bit):\n", code.linear, code.bitness);
    for _ in 0..INSTRUCTIONS {
        if !decoder.can_decode() {
            break;
        }
        let start = decoder.position();
        let instruction = decoder.decode();
        let bytes = code.bytes.get(start..decoder.position()).unwrap_or_default();
        let hex: String = bytes.iter().map(|b| format!("{b:02x} ")).collect();
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        out.push_str(&format!("  {:016x}  {hex:<33}{text}\n", instruction.ip()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_shown_as_nasm() {
        let code = CodeBytes { linear: 0x1000, bytes: vec![0xf4, 0x0f, 0x0b, 0x48], bitness: 64 };
        let text = disassemble(&code);
        assert!(text.contains("0000000000001000  f4") && text.contains("hlt"), "{text}");
        assert!(text.contains("ud2"), "{text}");
    }

    #[test]
    fn unmapped_code_says_so() {
        assert!(disassemble(&CodeBytes { linear: 5, bytes: vec![], bitness: 16 }).contains("not mapped"));
    }
}
