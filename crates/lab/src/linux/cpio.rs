//! Writes the archive that a Linux kernel unpacks as its first root: cpio in the `newc` format.
//!
//! Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Each entry is a header of
//! text, the name with its NUL, padding to 4 bytes, the content, padding to 4 bytes; `TRAILER!!!` ends it.

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;

/// An archive under construction.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a directory. The kernel creates none by itself: parents come first.
    pub fn directory(&mut self, name: &str) -> &mut Archive {
        self.entry(name, DIRECTORY, &[])
    }

    /// Adds a file that may be executed.
    ///
    /// # Panics
    /// When it is 4 GiB or larger: the format has 32 bits for a size, and nothing of ours comes near.
    pub fn file(&mut self, name: &str, content: &[u8]) -> &mut Archive {
        self.entry(name, EXECUTABLE, content)
    }

    /// Ends the archive and gives its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> &mut Archive {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of less than 4 GiB");
        let name_size = name.len() as u32 + 1;
        let links = 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
        // Times are zero: the same files make the same archive.
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_to_four_bytes_and_closed_by_the_trailer() {
        let mut archive = Archive::default();
        archive.directory("bin").file("bin/x", b"hello");
        let text = String::from_utf8(archive.finish()).unwrap();
        let zeros = |count| "00000000".repeat(count);
        let expected = [
            format!("07070100000001000041ed{}00000001{}00000004{}bin\0", zeros(2), zeros(6), zeros(1)),
            "\0\0".to_owned(),
            format!("07070100000002000081ed{}00000001{}", zeros(2), zeros(1)),
            format!("00000005{}00000006{}bin/x\0hello\0\0\0", zeros(4), zeros(1)),
            format!("07070100000003{}00000001{}0000000b{}TRAILER!!!\0", zeros(3), zeros(6), zeros(1)),
            "\0\0\0".to_owned(),
        ];
        assert_eq!(text, expected.concat());
    }
}
