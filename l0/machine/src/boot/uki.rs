//! Unified kernel images (the UAPI Group's UKI specification): a PE file with a kernel in
//! section `.linux`, and optionally `.initrd` and `.cmdline`.
//!
//! Not supported: signatures, `.ucode`, `.dtb`, profiles, measured boot.

use object::LittleEndian;
use object::pe::ImageDosHeader;
use object::read::pe::ImageNtHeaders;

use super::BootError;

/// The sections of a UKI that matter for booting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uki<'d> {
    /// The kernel.
    pub linux: &'d [u8],
    /// The initrd.
    pub initrd: Option<&'d [u8]>,
    /// The command line, as it stands in the section.
    pub cmdline: Option<&'d [u8]>,
    /// The kernel's release.
    pub uname: Option<&'d [u8]>,
    /// os-release of the system it belongs to.
    pub os_release: Option<&'d [u8]>,
}

impl Uki<'_> {
    /// The command line as text without the padding that sections end with.
    pub fn command_line(&self) -> Option<String> {
        self.cmdline.map(text)
    }
}

/// The text in a section, up to the first NUL and without surrounding space.
pub(crate) fn text(section: &[u8]) -> String {
    let end = section.iter().position(|b| *b == 0).unwrap_or(section.len());
    String::from_utf8_lossy(section.get(..end).unwrap_or_default()).trim().to_owned()
}

/// Whether `data` is a PE file (which a bzImage with EFI stub is too).
pub fn is_pe(data: &[u8]) -> bool {
    data.starts_with(b"MZ")
        && ImageDosHeader::parse(data).is_ok_and(|dos| {
            let at = u64::from(dos.nt_headers_offset());
            usize::try_from(at).ok().and_then(|at| data.get(at..)).is_some_and(|d| d.starts_with(b"PE\0\0"))
        })
}

/// Reads the sections of the PE file `data`, which is called `file` in errors.
///
/// # Errors
/// [`BootError::Malformed`], [`BootError::Truncated`], and [`BootError::NotAKernel`] when
/// there is no kernel in it.
pub fn parse<'d>(file: &str, data: &'d [u8]) -> Result<Uki<'d>, BootError> {
    let malformed = |what, offset, reason: object::Error| BootError::Malformed {
        file: file.into(),
        what,
        offset,
        reason: reason.to_string(),
    };
    let dos = ImageDosHeader::parse(data).map_err(|r| malformed("the DOS header", 0, r))?;
    let mut at = dos.nt_headers_offset().into();
    let headers = at;
    let (nt, _) = object::pe::ImageNtHeaders64::parse(data, &mut at)
        .map_err(|r| malformed("the PE header", headers, r))?;
    let sections = nt.sections(data, at).map_err(|r| malformed("the section table", at, r))?;
    let find = |name: &[u8]| -> Result<Option<&'d [u8]>, BootError> {
        let Some((_, section)) = sections.iter().enumerate().find(|(_, s)| s.raw_name() == name) else {
            return Ok(None);
        };
        let (offset, raw) = section.pe_file_range();
        let bytes = section.pe_data(data).map_err(|_| BootError::Truncated {
            file: file.into(),
            what: "a section of the UKI",
            offset: offset.into(),
            need: raw.into(),
            len: data.len() as u64,
        })?;
        // On disk a section is padded to the file's alignment.
        let len = bytes.len().min(section.virtual_size.get(LittleEndian) as usize);
        Ok(Some(bytes.get(..len).unwrap_or(bytes)))
    };
    let Some(linux) = find(b".linux")? else {
        let found = "a PE program without a .linux section".into();
        return Err(BootError::NotAKernel { file: file.into(), found });
    };
    Ok(Uki {
        linux,
        initrd: find(b".initrd")?,
        cmdline: find(b".cmdline")?,
        uname: find(b".uname")?,
        os_release: find(b".osrel")?,
    })
}
