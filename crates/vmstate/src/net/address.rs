//! Where a QMP monitor listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::libvirt::{DomainName, LibvirtUri};
use crate::{Error, Kind};

/// The address of a QMP monitor: a unix socket's path, `tcp:HOST:PORT`, or a domain of libvirt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP socket; descriptors cannot be passed through it.
    Tcp {
        /// A name or an address, an IPv6 one without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// The monitor that belongs to libvirt. It has no spelling of its own: a domain is named by an option.
    Domain {
        /// Whose domain it is.
        uri: LibvirtUri,
        /// The domain.
        name: DomainName,
    },
}

impl FromStr for QmpAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<QmpAddress, Error> {
        let misuse = |what: &str| {
            Error::new(Kind::Misuse, format!("QMP address `{text}`: {what}"))
                .hint("give the path of a unix socket, or tcp:HOST:PORT")
        };
        if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = rest.rsplit_once(':').ok_or_else(|| misuse("no port"))?;
            let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
            let port = port.parse().map_err(|_| misuse("the port is not a number up to 65535"))?;
            if host.is_empty() {
                return Err(misuse("no host"));
            }
            return Ok(QmpAddress::Tcp { host: host.to_owned(), port });
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err(misuse("no path"));
        }
        Ok(QmpAddress::Unix(PathBuf::from(path)))
    }
}

impl fmt::Display for QmpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QmpAddress::Unix(path) => write!(f, "{}", path.display()),
            QmpAddress::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            QmpAddress::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            QmpAddress::Domain { uri, name } => write!(f, "domain {name} of {uri}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_and_print() {
        for (text, printed) in [
            ("/run/vm.qmp", "/run/vm.qmp"),
            ("unix:/run/vm.qmp", "/run/vm.qmp"),
            ("vm.qmp", "vm.qmp"),
            ("tcp:localhost:4444", "tcp:localhost:4444"),
            ("tcp:[::1]:4444", "tcp:[::1]:4444"),
        ] {
            let address: QmpAddress = text.parse().expect(text);
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse::<QmpAddress>().expect(printed), address);
        }
    }

    #[test]
    fn malformed_addresses_name_the_fault() {
        for (text, fault) in [
            ("", "QMP address ``: no path"),
            ("tcp:4444", "QMP address `tcp:4444`: no port"),
            ("tcp::4444", "QMP address `tcp::4444`: no host"),
            ("tcp:host:70000", "QMP address `tcp:host:70000`: the port is not a number up to 65535"),
        ] {
            assert_eq!(text.parse::<QmpAddress>().unwrap_err().to_string(), fault);
        }
    }
}
