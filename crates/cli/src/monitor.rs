//! Which guest: its own monitor, or a domain of libvirt.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use vmstate::libvirt::{DomainName, LibvirtUri};
use vmstate::net::QmpAddress;
use vmstate::{Error, Kind};

/// The options that name a running guest.
#[derive(Debug, ClapArgs)]
pub struct MonitorArgs {
    /// The guest's QMP monitor: a unix socket's path, or tcp:HOST:PORT
    #[arg(long, value_name = "ADDR", env = "VMSTATE_QMP")]
    pub qmp: Option<QmpAddress>,

    /// A domain of libvirt instead: its name, UUID or number
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,

    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// The option that names a libvirt.
#[derive(Debug, ClapArgs)]
pub struct ConnectArgs {
    /// Whose domain: libvirt's daemon of this host [default: qemu:///system for root, else qemu:///session]
    #[arg(long, short = 'c', value_name = "URI", env = "LIBVIRT_DEFAULT_URI")]
    pub connect: Option<LibvirtUri>,
}

impl ConnectArgs {
    /// The daemon that is named or meant.
    pub fn uri(&self) -> vmstate::Result<LibvirtUri> {
        self.connect.clone().map_or_else(LibvirtUri::of_this_user, Ok)
    }
}

impl MonitorArgs {
    /// The guest that is named.
    pub fn address(&self) -> vmstate::Result<QmpAddress> {
        match (&self.qmp, &self.domain) {
            // With VMSTATE_QMP in the environment both may be there; the command line is the plainer wish.
            (Some(_), Some(_)) if std::env::var_os("VMSTATE_QMP").is_none() => {
                Err(Error::new(Kind::Misuse, "both --qmp and --domain").hint("name the guest by one of them"))
            }
            (None, None) => Err(Error::new(Kind::Misuse, "which guest is not said")
                .hint("give --qmp with the address of its monitor, or --domain with its name in libvirt")),
            (_, Some(name)) => {
                Ok(QmpAddress::Domain { uri: self.connect.uri()?, name: DomainName(name.clone()) })
            }
            (Some(qmp), None) => Ok(qmp.clone()),
        }
    }
}

/// The options of a restore by libvirt.
#[derive(Debug, ClapArgs)]
pub struct DomainRestoreArgs {
    /// The domain's XML to use instead of the image's (with --domain)
    #[arg(long, value_name = "FILE", requires = "domain")]
    pub xml: Option<PathBuf>,

    /// Begin with a fresh NVRAM (with --domain)
    #[arg(long, requires = "domain")]
    pub reset_nvram: bool,

    #[command(flatten)]
    pub connect: ConnectArgs,
}
