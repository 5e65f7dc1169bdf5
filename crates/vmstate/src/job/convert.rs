//! Convert: an image becomes one of another format, or of the same one at another place, and says the same.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use io::{Cancel, DraftOptions, Owner, Target, TargetKind};

use super::{DirectIo, Observer, Phases, Stopwatch, anonymous_memory_bytes};
use crate::sink::{Domain, Means, Sink, create_sink};
use crate::source::{Format, Input, InputBytes, Source, open_source, require_domain_xml};
use crate::{Error, Kind, Result};

/// The most channels.
const CHANNELS_MAX: u16 = 255;
/// An image with fewer bytes of pages is not worth trying how fast the target is.
const MEASURED_LEN_MIN: u64 = 256 << 20;

/// What to convert, into what, and how.
#[derive(Clone, Debug)]
pub struct ConvertSettings {
    /// The image: a file, a block device, a FIFO, or `-` for the standard input.
    pub from: PathBuf,
    /// What it is read as; `None` looks at it.
    pub from_format: Option<Format>,
    /// Where in its file it starts.
    pub from_offset: u64,
    /// The image to be: a file's name, a block device, a FIFO, or `-` for the standard output.
    pub to: PathBuf,
    /// Its format.
    pub to_format: Format,
    /// Where in a file that is there it starts, as of [`SaveSettings::offset`](super::SaveSettings::offset).
    pub to_offset: Option<u64>,
    /// How many channels read and write; `None` leaves it to vmstate.
    pub channels: Option<u16>,
    /// Whether pages bypass the page cache, on both sides.
    pub direct_io: DirectIo,
    /// The domain's XML for an image of libvirt; `None` takes that of the source.
    pub domain_xml: Option<String>,
    /// Whether an image of that name may be replaced, or what is on a device or behind the offset of a file.
    pub overwrite: bool,
    /// Whether the image is made durable before it gets its name.
    pub sync: bool,
    /// The permission bits of a new file.
    pub mode: u32,
    /// Whom a new file is given to.
    pub owner: Owner,
}

impl ConvertSettings {
    /// The defaults of the command line.
    pub fn new(from: impl Into<PathBuf>, to: impl Into<PathBuf>, to_format: Format) -> ConvertSettings {
        ConvertSettings {
            from: from.into(),
            from_format: None,
            from_offset: 0,
            to: to.into(),
            to_format,
            to_offset: None,
            channels: None,
            direct_io: DirectIo::Auto,
            domain_xml: None,
            overwrite: false,
            sync: true,
            mode: 0o600,
            owner: Owner::default(),
        }
    }
}

/// What a conversion did.
#[derive(Clone, Debug)]
pub struct ConvertReport {
    /// What the image was read as.
    pub from_format: Format,
    /// What it was written as.
    pub to_format: Format,
    /// Whether pages were written past the page cache.
    pub direct_io: bool,
    /// Why they were not, where they were to if they could.
    pub direct_io_reason: Option<String>,
    /// Channels used.
    pub channels: u16,
    /// The length of all RAM.
    pub ram_bytes: u64,
    /// Bytes of pages that were moved; one that a stream has twice counts twice.
    pub data_bytes: u64,
    /// Bytes of pages that the image has and that are zero.
    pub zero_bytes: u64,
    /// Bytes of device state and its description.
    pub device_bytes: u64,
    /// The whole conversion.
    pub duration: Duration,
    /// The most anonymous memory seen in this process.
    pub peak_memory_bytes: u64,
    /// How long each phase took.
    pub phases: Phases,
}

impl ConvertReport {
    /// Data bytes per second of the phase that moved them; 0 where none were.
    pub fn rate_bytes_per_s(&self) -> u64 {
        let moving = self.phases.0.iter().find(|(name, _)| *name == "ram").map_or(self.duration, |(_, d)| *d);
        if moving.is_zero() { 0 } else { (self.data_bytes as f64 / moving.as_secs_f64()) as u64 }
    }
}

/// Converts an image. RAM and device state come out as they were: a page that is not in an image and one of zeroes
/// are the same, device sections and their description are taken over byte for byte.
///
/// On success the image stands under its name, durable unless `sync` is off. On failure, and when `cancel` is
/// triggered, nothing stands there that did not before; what went into a pipe cannot be taken back, but is no whole
/// image.
///
/// # Errors
/// [`Kind::Damaged`] and [`Kind::Unsupported`] at the first fault of the source, with file, offset and field;
/// [`Kind::Misuse`] for what cannot be; [`Kind::Io`], [`Kind::Interrupted`].
pub fn convert(
    settings: &ConvertSettings,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<ConvertReport> {
    let channels = settings.channels.unwrap_or_else(super::save::default_channels);
    if !(1..=CHANNELS_MAX).contains(&channels) {
        return Err(Error::new(Kind::Misuse, format!("channels must be between 1 and {CHANNELS_MAX}")));
    }
    if let Some(xml) = &settings.domain_xml {
        if !matches!(settings.to_format, Format::Libvirt(_)) {
            let clause = "only an image of libvirt begins with a description of the domain";
            return Err(Error::new(Kind::Misuse, clause)
                .hint("leave the XML out, or name one of libvirt's formats by -O"));
        }
        require_domain_xml(xml)?;
    }
    let mut watch = Stopwatch::start(observer);
    watch.phase("open");
    let (mut source, from_format) = open(settings, cancel, observer)?;
    refuse_itself(settings, source.end())?;
    let mut target = Target::open(&settings.to, settings.to_offset, draft_options(settings), cancel)?;
    let expected = source.data_bytes_max()?;
    settle_direct_io(settings, &mut target, expected, observer)?;
    let means = Means {
        channels,
        counters: watch.progress.counters().clone(),
        sync: settings.sync,
        domain: domain(settings, &*source),
        was_running: source.domain().map(|head| head.was_running),
        cancel: cancel.clone(),
    };
    let (device_bytes, memory_bytes) = {
        let mut sink = create_sink(settings.to_format, &target, means)?;
        // What is compressed takes what it takes: nothing is known of that beforehand.
        if !settings.to_format.is_compressed() {
            require_room(&target, &*source, &*sink, expected)?;
        }
        watch.phase("ram");
        if let Some(expected) = expected {
            watch.progress.expect(expected);
        }
        let keeps_head = matches!(settings.to_format, Format::Libvirt(_));
        carry(&mut *source, &mut *sink, keeps_head, &mut watch)
            .map_err(|error| error.of_file(&settings.to))?
    };
    let direct_io_reason = match target.direct_io() {
        io::DirectIo::Unsupported { reason } => Some(reason),
        io::DirectIo::Supported { .. } => None,
    };
    let direct_io = target.direct().is_some();
    publish(settings, target, cancel, &mut watch)?;
    let moved = watch.progress.counters().read();
    let (phases, duration) = watch.finish();
    Ok(ConvertReport {
        from_format,
        to_format: settings.to_format,
        direct_io,
        direct_io_reason,
        channels,
        ram_bytes: source.shape().ram_bytes(),
        data_bytes: moved.bytes_written,
        zero_bytes: moved.bytes_zero,
        device_bytes,
        duration,
        peak_memory_bytes: memory_bytes.max(anonymous_memory_bytes()),
        phases,
    })
}

/// What an image of libvirt says of its domain: what the source says, unless told otherwise. Its cookie
/// stays, as it does when libvirt restores with another XML.
fn domain(settings: &ConvertSettings, source: &dyn Source) -> Option<Domain> {
    let of_source = source.domain().map(|head| Domain { xml: head.xml.clone(), cookie: head.cookie.clone() });
    match (&settings.domain_xml, of_source) {
        (None, of_source) => of_source,
        (Some(xml), of_source) => {
            Some(Domain { xml: xml.clone(), cookie: of_source.and_then(|domain| domain.cookie) })
        }
    }
}

/// Opens the source and says what it is.
fn open(
    settings: &ConvertSettings,
    cancel: &Cancel,
    observer: &dyn Observer,
) -> Result<(Box<dyn Source>, Format)> {
    let mut input = Input::open(&settings.from, settings.from_offset, settings.direct_io, cancel)?;
    if let InputBytes::File(pair) = &mut input.bytes
        && settings.direct_io == DirectIo::Auto
        && let Ok(metadata) = pair.buffered.metadata()
        && pair.direct.is_some()
        && super::restore::is_cached(pair, metadata.blocks() * 512)
    {
        observer.note("the image is in the page cache: it is read from there");
        pair.direct = None;
    }
    let source = open_source(input, settings.from_format)?;
    let format = source.format();
    Ok((source, format))
}

/// Refuses an image that would be written over the one that is read. A new file of the same name is another, and so is a
/// place behind `source_end`: what is written there leaves all before it as it is.
fn refuse_itself(settings: &ConvertSettings, source_end: Option<u64>) -> Result<()> {
    let kind = TargetKind::of(&settings.to, settings.to_offset)?;
    let is_in_place = matches!(kind, TargetKind::Place | TargetKind::Device);
    let identity = |path: &PathBuf| {
        std::fs::metadata(path).ok().map(|found| match kind {
            TargetKind::Device => (0, found.rdev()),
            _ => (found.dev(), found.ino()),
        })
    };
    if !is_in_place || identity(&settings.from).is_none_or(|from| Some(from) != identity(&settings.to)) {
        return Ok(());
    }
    let start = settings.to_offset.unwrap_or(0);
    let path = settings.from.display();
    let (clause, hint) = match source_end {
        Some(end) if start >= end => return Ok(()),
        Some(end) => (
            format!(
                "{path} would be written over while it is read: from {start:#x} on, and it is read up to {end:#x}"
            ),
            format!("give an --offset of {end:#x} or more, or convert into another file"),
        ),
        None => (
            format!("{path} would be written over while it is read"),
            "convert into another file; with --overwrite it may have the same name".to_owned(),
        ),
    };
    Err(Error::new(Kind::Misuse, clause).hint(hint))
}

/// Moves the guest, all but what makes it an image under its name; gives the length of the device state and what
/// memory it took. Where the image has no head of libvirt's, what that of the source says goes into the device state.
fn carry(
    source: &mut dyn Source,
    sink: &mut dyn Sink,
    keeps_head: bool,
    watch: &mut Stopwatch<'_>,
) -> Result<(u64, u64)> {
    let shape = source.shape().clone();
    sink.write_pages(&shape, source.pages()?)?;
    let memory_bytes = anonymous_memory_bytes();
    watch.progress.complete();
    watch.phase("metadata");
    let tail = source.tail()?;
    let tail = if keeps_head { tail } else { tail.settled(source.path())? };
    sink.complete(&tail)?;
    Ok((tail.bytes.len() as u64, memory_bytes))
}

/// Makes an image of what was written. Behind this there is no way back, and no interrupt.
fn publish(
    settings: &ConvertSettings,
    mut target: Target,
    cancel: &Cancel,
    watch: &mut Stopwatch<'_>,
) -> Result<()> {
    watch.phase("publish");
    if !target.is_sequential() {
        if settings.sync {
            target.sync()?;
        }
        if cancel.is_cancelled() {
            return Err(Error::interrupted());
        }
    }
    Ok(target.publish()?)
}

/// Refuses a target that has too little room. What an image has beside its pages is only an estimate, and is not
/// what refuses one.
fn require_room(target: &Target, source: &dyn Source, sink: &dyn Sink, expected: Option<u64>) -> Result<()> {
    let Some(room) = target.room_bytes()? else { return Ok(()) };
    let needs = match target.is_device() {
        // A device holds the whole layout, and its sink says so before it writes.
        true => return Ok(()),
        false => expected.unwrap_or(0),
    };
    if needs <= room {
        return Ok(());
    }
    let clause = format!(
        "the file system of {} has {} MiB left, the image of {} takes {} MiB",
        target.path().display(),
        room >> 20,
        source.path().display(),
        needs.saturating_add(sink.metadata_bytes(source.shape())).div_ceil(1 << 20)
    );
    Err(Error::io(clause, std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error())))
}

/// Tries how fast the target is, where the choice is ours and there is enough to be written, and leaves direct I/O
/// where it is a trap.
fn settle_direct_io(
    settings: &ConvertSettings,
    target: &mut Target,
    expected: Option<u64>,
    observer: &dyn Observer,
) -> Result<()> {
    if settings.direct_io != DirectIo::Auto || expected.is_none_or(|bytes| bytes < MEASURED_LEN_MIN) {
        return Ok(());
    }
    if let Some(reason) = target.measure()?.and_then(super::save::why_not_direct_at) {
        observer.note(&format!("direct I/O is left: {reason}"));
        target.leave_direct(&reason);
    }
    Ok(())
}

fn draft_options(settings: &ConvertSettings) -> DraftOptions {
    DraftOptions {
        mode: settings.mode,
        owner: settings.owner,
        overwrite: settings.overwrite,
        direct: settings.direct_io.into(),
        sync: settings.sync,
    }
}
