//! Which daemon: libvirt's connection URIs, as far as they lead to this host.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{Error, Kind};

/// The daemon of a connection URI such as `qemu:///system`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtUri {
    text: String,
    /// What the daemon is told to open.
    driver: &'static str,
    /// Where it may listen, the likelier place first.
    sockets: Vec<PathBuf>,
}

impl LibvirtUri {
    /// The daemon that a user of this process means who names none: the system's for root, else the session's.
    ///
    /// # Errors
    /// As [`LibvirtUri::from_str`].
    pub fn of_this_user() -> Result<LibvirtUri, Error> {
        let system = rustix::process::geteuid().is_root();
        if system { "qemu:///system" } else { "qemu:///session" }.parse()
    }

    /// What the daemon is told to open: the URI without what only says how to reach it.
    pub fn driver(&self) -> &'static str {
        self.driver
    }

    /// The sockets on which the daemon may listen: that of the QEMU daemon and that of the one for everything.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }
}

impl FromStr for LibvirtUri {
    type Err = Error;

    /// Reads `qemu:///system` or `qemu:///session`, with `+unix` and `?socket=PATH` if they are there.
    ///
    /// # Errors
    /// [`Kind::Misuse`] for anything else.
    fn from_str(text: &str) -> Result<LibvirtUri, Error> {
        let misuse = |what: &str| {
            Error::new(Kind::Misuse, format!("libvirt URI `{text}`: {what}"))
                .hint("give qemu:///system or qemu:///session, with ?socket=PATH if it listens elsewhere")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| misuse("it is no URI"))?;
        if scheme != "qemu" && scheme != "qemu+unix" {
            return Err(misuse("only QEMU on this host can be reached (qemu or qemu+unix)"));
        }
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, path) = place.split_once('/').ok_or_else(|| misuse("it has no path"))?;
        if !host.is_empty() {
            return Err(misuse("a guest's memory is read where it is, so the daemon must be this host's"));
        }
        let (driver, folder) = match path {
            "system" => ("qemu:///system", Some(PathBuf::from("/run/libvirt"))),
            "session" => ("qemu:///session", session_folder()),
            _ => return Err(misuse("its path is neither /system nor /session")),
        };
        let given = query.split('&').find_map(|part| part.strip_prefix("socket="));
        let sockets = match (given, folder) {
            (Some(""), _) => return Err(misuse("the socket has no path")),
            (Some(path), _) => vec![PathBuf::from(path)],
            (None, Some(folder)) => vec![folder.join("virtqemud-sock"), folder.join("libvirt-sock")],
            (None, None) => {
                return Err(misuse("XDG_RUNTIME_DIR is not set, so the session's socket is not known"));
            }
        };
        Ok(LibvirtUri { text: text.to_owned(), driver, sockets })
    }
}

impl fmt::Display for LibvirtUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn session_folder() -> Option<PathBuf> {
    std::env::var_os("XDG_RUNTIME_DIR").map(|folder| PathBuf::from(folder).join("libvirt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_leads_to_sockets_of_this_host() {
        let system = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"].map(PathBuf::from);
        for (text, driver, sockets) in [
            ("qemu:///system", "qemu:///system", system.to_vec()),
            ("qemu+unix:///system", "qemu:///system", system.to_vec()),
            ("qemu:///system?socket=/run/other", "qemu:///system", vec![PathBuf::from("/run/other")]),
            ("qemu+unix:///session?mode=legacy&socket=a", "qemu:///session", vec![PathBuf::from("a")]),
        ] {
            let uri: LibvirtUri = text.parse().expect(text);
            assert_eq!((uri.driver(), uri.sockets()), (driver, sockets.as_slice()), "{text}");
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn what_leads_elsewhere_is_refused_with_the_reason() {
        for (text, fault) in [
            ("system", "it is no URI"),
            ("xen:///system", "only QEMU on this host can be reached (qemu or qemu+unix)"),
            ("qemu+ssh://host/system", "only QEMU on this host can be reached (qemu or qemu+unix)"),
            ("qemu://host", "it has no path"),
            ("qemu://host/system", "a guest's memory is read where it is, so the daemon must be this host's"),
            ("qemu:///embed", "its path is neither /system nor /session"),
            ("qemu:///system?socket=", "the socket has no path"),
        ] {
            let error = text.parse::<LibvirtUri>().unwrap_err();
            assert_eq!(error.to_string(), format!("libvirt URI `{text}`: {fault}"));
        }
    }
}
