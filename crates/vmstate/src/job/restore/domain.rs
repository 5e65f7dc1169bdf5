//! A restore that libvirt does: it makes the domain that an image of its own begins with.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io::{Cancel, DirectChoice, ReadPair};
use wire::libvirt::{Head, PayloadFormat};
use wire::libvirt_rpc::format::{
    VIR_DOMAIN_SAVE_BYPASS_CACHE, VIR_DOMAIN_SAVE_PARAM_DXML, VIR_DOMAIN_SAVE_PARAM_FILE,
    VIR_DOMAIN_SAVE_PARAM_PARALLEL_CHANNELS, VIR_DOMAIN_SAVE_PAUSED, VIR_DOMAIN_SAVE_RESET_NVRAM,
    VIR_DOMAIN_SAVE_RUNNING,
};
use wire::libvirt_rpc::{Arguments, Procedure};

use super::{Record, in_use};
use crate::job::save::QEMU_CHANNELS;
use crate::job::{DirectIo, Observer};
use crate::libvirt::{Connection, GivingUp, LibvirtUri};
use crate::source::{Image, open_image};
use crate::{Error, Kind, Result};

/// How much of an image is read for its head, in bytes.
const HEAD_LEN_MAX: u64 = 40 << 20;

/// Images with less on the disk take no longer through the page cache.
const DIRECT_BYTES_MIN: u64 = 256 << 20;

/// What to restore and by which libvirt.
#[derive(Clone, Debug)]
pub struct DomainRestoreSettings {
    /// The daemon.
    pub uri: LibvirtUri,
    /// An image that begins with a domain's XML.
    pub image: PathBuf,
    /// XML to use instead of the image's.
    pub xml: Option<String>,
    /// The state that the domain is to come to.
    pub record: Record,
    /// Whether libvirt reads past the page cache. [`DirectIo::Auto`] has it do so for a large image with places for pages
    /// that is not in the cache already.
    pub direct_io: DirectIo,
    /// How many channels read, where the image has places for pages; eight unless told, where libvirt takes one by itself.
    pub channels: Option<u16>,
    /// Whether the domain begins with a fresh NVRAM.
    pub reset_nvram: bool,
}

/// What libvirt did.
#[derive(Clone, Debug)]
pub struct DomainRestoreReport {
    /// The domain's name.
    pub domain: String,
    /// Whether libvirt read past the page cache.
    pub direct_io: bool,
    /// Bytes of pages that the image has.
    pub read_bytes: u64,
    /// The whole restore.
    pub duration: Duration,
}

/// Lets libvirt restore a domain from an image, after a look at all of it but the pages that have places of their own. Where
/// the pages stand amid a stream, compressed or not, it is read twice: by vmstate, and by libvirt.
///
/// # Errors
/// [`Kind::Damaged`] and [`Kind::Unsupported`] of an image that is none of libvirt's, or not whole: libvirt's own
/// reader looks at the header only, and a truncated image crashes QEMU. [`Kind::Peer`] with libvirt's words.
pub fn restore_domain(
    settings: &DomainRestoreSettings,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<DomainRestoreReport> {
    let start = Instant::now();
    observer.phase("check");
    let file = open_image(&settings.image)?;
    in_use::while_read(&file, &settings.image)?;
    let head = read_head(&file, &settings.image)?;
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let own = File::open(own)
        .map_err(|error| Error::io(format!("cannot open {}", settings.image.display()), error))?;
    let read_bytes = Image::from_file(own, &settings.image, 0)?.data_bytes()?;
    let path = std::fs::canonicalize(&settings.image)
        .map_err(|error| Error::io(format!("cannot find {}", settings.image.display()), error))?;
    let path = path.to_str().ok_or_else(|| {
        Error::new(Kind::Misuse, format!("{} is a name that libvirt does not take", path.display()))
            .hint("give the image a name in UTF-8")
    })?;
    let direct_io = match settings.direct_io {
        DirectIo::On => true,
        DirectIo::Off => false,
        DirectIo::Auto => is_better_read_directly(&settings.image, head.format, DIRECT_BYTES_MIN),
    };
    observer.phase("connect");
    let mut libvirt = Connection::open(&settings.uri, GivingUp::Cancelled(cancel.clone()))?;
    observer.phase("restore");
    let xml = settings.xml.as_deref();
    let flags = flags(settings, direct_io);
    // A libvirt that knows such images knows of channels.
    let is_sparse = head.format == PayloadFormat::Sparse;
    let restored = match settings.channels.or(is_sparse.then_some(QEMU_CHANNELS)) {
        None => {
            let arguments = Arguments::new().string(path).optional_string(xml).word(flags);
            libvirt.call(Procedure::DomainRestoreFlags, &arguments)
        }
        Some(channels) => {
            let count = if xml.is_some() { 3 } else { 2 };
            let mut arguments = Arguments::new()
                .word(count)
                .text_parameter(VIR_DOMAIN_SAVE_PARAM_FILE, path)
                .number_parameter(VIR_DOMAIN_SAVE_PARAM_PARALLEL_CHANNELS, u32::from(channels));
            if let Some(xml) = xml {
                arguments = arguments.text_parameter(VIR_DOMAIN_SAVE_PARAM_DXML, xml);
            }
            libvirt.call(Procedure::DomainRestoreParams, &arguments.word(flags))
        }
    };
    restored.map_err(|error| match error.kind() {
        // There is no call that takes a restore back.
        Kind::Interrupted => error.hint("libvirt goes on with the restore; virsh destroy ends the domain"),
        _ => error,
    })?;
    let domain = crate::libvirt::name_of(settings.xml.as_deref().unwrap_or(&head.xml))?;
    Ok(DomainRestoreReport { domain, direct_io, read_bytes, duration: start.elapsed() })
}

/// Reads what stands before the guest.
fn read_head(mut file: &File, path: &Path) -> Result<Head> {
    let failed = |error| Error::io(format!("cannot read {}", path.display()), error);
    let len = file.metadata().map_err(failed)?.len();
    let mut bytes = Vec::new();
    // Two texts of the greatest length, and padding.
    (&mut file).take(HEAD_LEN_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Head::decode(&bytes, 0, len).map_err(|fault| {
        Error::new(Kind::Damaged, format!("{} is no image that libvirt restores", path.display()))
            .because(fault.at_end())
            .hint("vmstate info shows what it is; vmstate convert makes one of libvirt's of it")
    })
}

/// Whether QEMU has an image sooner past the page cache. What cannot be found out is left as libvirt does it by itself.
fn is_better_read_directly(path: &Path, format: PayloadFormat, bytes_min: u64) -> bool {
    // Others come to QEMU through a pipe, whoever reads them.
    if format != PayloadFormat::Sparse {
        return false;
    }
    let Ok(pair) = ReadPair::open(path, DirectChoice::Auto) else { return false };
    let Ok(data_bytes) = pair.buffered.metadata().map(|metadata| metadata.blocks() * 512) else {
        return false;
    };
    pair.direct.is_some()
        && data_bytes >= bytes_min
        && io::is_nearly_cached(&pair.buffered, data_bytes).is_ok_and(|is_cached| !is_cached)
}

fn flags(settings: &DomainRestoreSettings, direct_io: bool) -> u32 {
    let state = match settings.record {
        Record::AsItWas => 0,
        Record::Running => VIR_DOMAIN_SAVE_RUNNING,
        Record::Paused => VIR_DOMAIN_SAVE_PAUSED,
    };
    let when = |wanted: bool, flag: u32| if wanted { flag } else { 0 };
    state
        | when(direct_io, VIR_DOMAIN_SAVE_BYPASS_CACHE)
        | when(settings.reset_nvram, VIR_DOMAIN_SAVE_RESET_NVRAM)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use rustix::fs::{Advice, fadvise};

    use super::*;

    #[test]
    fn a_large_image_that_is_not_in_the_cache_is_read_past_it() {
        const LEN: u64 = 4 << 20;
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![1; LEN as usize]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        let judge = |format, bytes_min| is_better_read_directly(&path, format, bytes_min);
        assert!(!judge(PayloadFormat::Sparse, LEN), "it is in the cache");
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        // Where the file system takes no direct I/O there is no choice.
        let has_direct_io = ReadPair::open(&path, DirectChoice::Auto).unwrap().direct.is_some();
        assert_eq!(judge(PayloadFormat::Sparse, LEN), has_direct_io);
        assert!(!judge(PayloadFormat::Sparse, 2 * LEN), "it is small");
        assert!(!judge(PayloadFormat::Raw, LEN), "it comes through a pipe");
        assert!(!is_better_read_directly(&directory.path().join("none"), PayloadFormat::Sparse, 0));
    }
}
