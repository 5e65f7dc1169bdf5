//! What a client sends: lines, and the descriptors that come with some of them.

use std::os::fd::OwnedFd;

/// Bytes of lines as they are received, with the descriptors among them.
///
/// What is received at once ends with whatever had descriptors, one line or a part of one: the kernel hands out nothing
/// behind them (net/unix/af_unix.c, `unix_stream_read_generic`). A line that the sender's socket had no room for comes in
/// two parts, and the descriptors with the first.
#[derive(Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// Descriptors in the order in which they came, each with how many lines come before its own.
    fds: Vec<(usize, OwnedFd)>,
}

impl Lines {
    /// Takes what was received at once.
    pub(super) fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        if !fds.is_empty() {
            let before = match self.bytes.split_last() {
                Some((b'\n', before)) => before,
                _ => &self.bytes,
            };
            let nth = before.iter().filter(|byte| **byte == b'\n').count();
            self.fds.extend(fds.into_iter().map(|fd| (nth, fd)));
        }
    }

    /// The next line that is whole, with its end, and its descriptors.
    pub(super) fn next(&mut self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let end = self.bytes.iter().position(|byte| *byte == b'\n')?;
        let line = self.bytes.drain(..=end).collect();
        let own = self.fds.partition_point(|(nth, _)| *nth == 0);
        let fds = self.fds.drain(..own).map(|(_, fd)| fd).collect();
        for (nth, _) in &mut self.fds {
            *nth -= 1;
        }
        Some((line, fds))
    }

    /// How many bytes wait for the end of their line, or for being asked for.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn descriptors_are_those_of_the_line_that_they_came_with() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| File::create(directory.path().join(name)).unwrap();
        let inode = |fd: OwnedFd| File::from(fd).metadata().unwrap().ino();
        let (a, b, c) = (file("a"), file("b"), file("c"));
        let inodes = [&a, &b, &c].map(|file| file.metadata().unwrap().ino());
        let mut lines = Lines::default();
        let mut taken = Vec::new();
        let mut take = |lines: &mut Lines| {
            while let Some((line, fds)) = lines.next() {
                let fds = fds.into_iter().map(inode).collect::<Vec<_>>();
                taken.push((String::from_utf8(line).unwrap(), fds));
            }
        };
        // Lines before it in one go, and nothing behind it.
        lines.push(b"one\ntwo\nwith a\n", vec![a.into()]);
        take(&mut lines);
        // One that was cut in two, with the next one right behind it.
        lines.push(b"three\nwith", vec![b.into()]);
        take(&mut lines);
        lines.push(b" b\nfour\n", Vec::new());
        take(&mut lines);
        // Nobody has asked in between.
        lines.push(b"five\nwith c", vec![c.into()]);
        lines.push(b"\nsix\nse", Vec::new());
        take(&mut lines);
        assert_eq!(lines.len(), 2);
        let line = |text: &str, fds: &[u64]| (text.to_owned(), fds.to_vec());
        let expected = [
            line("one\n", &[]),
            line("two\n", &[]),
            line("with a\n", &inodes[..1]),
            line("three\n", &[]),
            line("with b\n", &inodes[1..2]),
            line("four\n", &[]),
            line("five\n", &[]),
            line("with c\n", &inodes[2..]),
            line("six\n", &[]),
        ];
        assert_eq!(taken, expected);
    }
}
