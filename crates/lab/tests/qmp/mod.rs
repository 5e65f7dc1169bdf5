//! Just enough QMP to stop a guest: this crate tests itself below the library's own client.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// A connection past its negotiation.
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    pub fn connect(path: &Path) -> Qmp {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut qmp = Qmp { lines: BufReader::new(stream) };
        assert!(qmp.line().get("QMP").is_some(), "no greeting");
        qmp.execute("qmp_capabilities");
        qmp
    }

    /// Executes a command without arguments and gives its answer.
    pub fn execute(&mut self, command: &str) -> Value {
        writeln!(self.lines.get_mut(), r#"{{"execute":"{command}"}}"#).unwrap();
        loop {
            let mut line = self.line();
            if line.get("event").is_none() {
                assert!(line.get("error").is_none(), "{command}: {line}");
                return line["return"].take();
            }
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}
