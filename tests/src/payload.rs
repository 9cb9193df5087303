//! Small bare-metal programs: multiboot 1 kernels of a few instructions, assembled by hand.
//!
//! The loader enters them in 32-bit protected mode with flat segments and interrupts off
//! (Multiboot Specification 0.6.96 §3.2).

/// Where the program is loaded and entered.
const LOAD: u32 = 0x0010_0000;
/// Flags bit 16: the header's address fields are valid.
const ADDRESSES_VALID: u32 = 1 << 16;
const MAGIC: u32 = 0x1bad_b002;
/// Magic, flags, checksum and five addresses.
const HEADER_SIZE: u32 = 32;

/// COM1's data register.
const SERIAL: u16 = 0x3f8;
/// isa-debug-exit's port.
const DEBUG_EXIT: u16 = 0xf4;

/// A program under construction.
#[derive(Clone, Debug, Default)]
pub struct Payload {
    code: Vec<u8>,
}

impl Payload {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends machine code.
    #[must_use]
    pub fn code(mut self, bytes: &[u8]) -> Self {
        self.code.extend_from_slice(bytes);
        self
    }

    /// `mov edx, port; mov al, value; out dx, al`
    #[must_use]
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).code(&[0xb0, value, 0xee])
    }

    /// `mov edx, port; mov eax, value; out dx, eax`
    #[must_use]
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.port(port).code(&[0xb8]).code(&value.to_le_bytes()).code(&[0xef])
    }

    /// `mov edx, port; in al, dx`
    #[must_use]
    pub fn in8(self, port: u16) -> Self {
        self.port(port).code(&[0xec])
    }

    /// `mov edx, port; in eax, dx`
    #[must_use]
    pub fn in32(self, port: u16) -> Self {
        self.port(port).code(&[0xed])
    }

    fn port(self, port: u16) -> Self {
        self.code(&[0xba]).code(&u32::from(port).to_le_bytes())
    }

    /// Prints on the serial port.
    #[must_use]
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |p, b| p.out8(SERIAL, b))
    }

    /// Executes CPUID `count` times: `mov esi, count; l: xor eax, eax; cpuid; dec esi; jnz l`.
    #[must_use]
    pub fn cpuid_loop(self, count: u32) -> Self {
        self.code(&[0xbe]).code(&count.to_le_bytes()).code(&[0x31, 0xc0, 0x0f, 0xa2, 0x4e, 0x75, 0xf9])
    }

    /// Ends the run by isa-debug-exit: `out 0xf4, al`.
    #[must_use]
    pub fn exit_with_al(self) -> Self {
        self.port(DEBUG_EXIT).code(&[0xee])
    }

    /// Ends the run by isa-debug-exit with `value`.
    #[must_use]
    pub fn exit(self, value: u8) -> Self {
        self.out8(DEBUG_EXIT, value)
    }

    /// Spins for ever: `l: pause; jmp l`.
    #[must_use]
    pub fn spin(self) -> Self {
        self.code(&[0xf3, 0x90, 0xeb, 0xfc])
    }

    /// `mov eax, 0x12345678`, then an exception without an IDT: `lidt [esp-8 (zeros)]; ud2`.
    #[must_use]
    pub fn triple_fault(self) -> Self {
        // mov esp, 0x200000; push 0; push 0; lidt [esp]; mov eax, 0x12345678; ud2
        self.code(&[0xbc, 0x00, 0x00, 0x20, 0x00, 0x6a, 0x00, 0x6a, 0x00])
            .code(&[0x0f, 0x01, 0x1c, 0x24])
            .code(&[0xb8, 0x78, 0x56, 0x34, 0x12])
            .code(&[0x0f, 0x0b])
    }

    /// What has been assembled so far.
    pub fn machine_code(&self) -> &[u8] {
        &self.code
    }

    /// The multiboot file.
    pub fn build(&self) -> Vec<u8> {
        let size = HEADER_SIZE + u32::try_from(self.code.len()).expect("test programs are small");
        let header = [
            MAGIC,
            ADDRESSES_VALID,
            0u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES_VALID),
            LOAD,               // header_addr
            LOAD,               // load_addr
            LOAD + size,        // load_end_addr
            LOAD + size,        // bss_end_addr
            LOAD + HEADER_SIZE, // entry_addr
        ];
        let mut file: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).collect();
        file.extend_from_slice(&self.code);
        file
    }

    /// Writes the file into `dir`; its path.
    pub fn write(&self, dir: &tempfile::TempDir) -> std::path::PathBuf {
        let path = dir.path().join("payload");
        std::fs::write(&path, self.build()).expect("the folder is writable");
        path
    }
}
