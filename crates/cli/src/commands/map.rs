//! `vmstate map`.

use std::borrow::Cow;
use std::fs::{Metadata, metadata};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf, absolute};

use serde_json::json;
use vmstate::job::{
    Joiner, MapKind, MapRange, MapRun, MapSettings, MapVisitor, MappedImage, map, map_changes,
};
use vmstate::page::RamBlock;
use vmstate::source::readable_again;
use vmstate::{Draft, DraftOptions, Error, Kind};

use super::Outcome;
use crate::args::{Map, is_stdout};
use crate::output::{Lines, put_bytes, size};
use crate::picture::{self, Caption, Grids};

/// Shows where guest memory is in an image, or what changed from one image to another.
pub fn run(args: &Map) -> vmstate::Result<Outcome> {
    refuse_pictures(args)?;
    let first = MappedImage::open(&readable_again(&args.image)?, args.offset)?;
    let second = match &args.other {
        Some(path) => Some(MappedImage::open(&readable_again(path)?, args.other_offset)?),
        None => None,
    };
    let wants_picture = args.svg.is_some() || args.png.is_some();
    let grids = if wants_picture { picture::grids(blocks(&first, second.as_ref())) } else { Vec::new() };
    let mut visitor = Visitor {
        listing: Listing::new(args, &first, second.as_ref()),
        // A picture instead of thousands of lines, unless a program asked.
        lists: args.json || !wants_picture,
        grids: wants_picture.then(|| Grids::new(grids)),
        totals: Vec::new(),
    };
    match &second {
        None => map(&first, MapSettings { offset: args.offset, scan: !args.no_scan }, &mut visitor)?,
        Some(second) => map_changes(&first, second, &mut visitor)?,
    }
    let Visitor { mut listing, lists, grids, totals } = visitor;
    if lists {
        listing.finish(&totals);
    }
    if let Some(Grids { grids, .. }) = grids {
        let scene = picture::scene(&caption(args, &first, second.as_ref()), &grids, args.layout.into());
        let theme = args.theme.into();
        if let Some(path) = &args.svg {
            write(path, picture::svg(&scene, theme).as_bytes(), args.overwrite)?;
        }
        if let Some(path) = &args.png {
            write(path, &picture::png(&scene, theme), args.overwrite)?;
        }
    }
    Ok(Outcome::Done)
}

/// The blocks of both images, each name once, with the greater length.
fn blocks(first: &MappedImage, second: Option<&MappedImage>) -> Vec<RamBlock> {
    let mut blocks = first.blocks();
    for block in second.map(MappedImage::blocks).unwrap_or_default() {
        match blocks.iter_mut().find(|known| known.name == block.name) {
            Some(known) => known.length = known.length.max(block.length),
            None => blocks.push(block),
        }
    }
    blocks
}

fn caption(args: &Map, first: &MappedImage, second: Option<&MappedImage>) -> Caption {
    let name = |path: &Path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let title = match &args.other {
        None => format!("Guest memory in {}", name(&args.image)),
        Some(other) => format!("What changed from {} to {}", name(&args.image), name(other)),
    };
    let blocks = blocks(first, second);
    let mut facts =
        vec![size(blocks.iter().map(|block| block.length).sum()), format!("{} blocks", blocks.len())];
    facts.extend(first.machine());
    facts.push(first.format().name().to_owned());
    Caption { title, facts: facts.join(" · ") }
}

fn exists(path: &Path) -> Error {
    let clause = format!("`{}` exists", path.display());
    Error::new(Kind::Misuse, clause).hint("give another name, or --overwrite")
}

/// Says beforehand what would be said when all of the image was read, and what would cost one of the images.
fn refuse_pictures(args: &Map) -> vmstate::Result<()> {
    let pictures: Vec<&PathBuf> = [&args.svg, &args.png].into_iter().flatten().collect();
    if let [svg, png] = pictures[..]
        && is_same(svg, png)
    {
        let clause = format!("{} cannot be both pictures", svg.display());
        return Err(Error::new(Kind::Misuse, clause).hint("give --svg and --png names of their own"));
    }
    for picture in pictures {
        if is_stdout(picture) {
            if args.json {
                let clause = "the standard output takes a picture or one JSON object, and not both";
                return Err(Error::new(Kind::Misuse, clause).hint("give the picture the name of a file"));
            }
            continue;
        }
        for image in [Some(&args.image), args.other.as_ref()].into_iter().flatten() {
            if is_same(picture, image) {
                let clause =
                    format!("{} is the image itself, which the picture would replace", picture.display());
                return Err(Error::new(Kind::Misuse, clause).hint("give another name"));
            }
        }
        if !args.overwrite && picture.symlink_metadata().is_ok() {
            return Err(exists(picture));
        }
    }
    Ok(())
}

/// Whether two names stand for one file, or will.
fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |found: Metadata| (found.dev(), found.ino());
    match (metadata(one).map(identity), metadata(other).map(identity)) {
        (Ok(one), Ok(other)) => one == other,
        _ => place(one) == place(other),
    }
}

/// Where a file that is not there yet will be.
fn place(path: &Path) -> Cow<'_, Path> {
    let directory = absolute(path).ok().and_then(|path| path.parent()?.canonicalize().ok());
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name).into(),
        _ => path.into(),
    }
}

/// Publishes a picture as images are: it gets its name when it is whole.
fn write(path: &Path, bytes: &[u8], overwrite: bool) -> vmstate::Result<()> {
    let cannot = |error| Error::io(format!("cannot write {}", path.display()), error);
    if is_stdout(path) {
        return put_bytes(bytes).map_err(cannot);
    }
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask);
    // A picture is no secret as the guest's memory is.
    let mode = 0o666 & !umask.as_raw_mode();
    let mut draft = Draft::create(path, DraftOptions { mode, overwrite, ..DraftOptions::default() })?;
    draft.buffered().write_all(bytes).map_err(cannot)?;
    Ok(draft.publish()?)
}

/// What there is of each kind in a block.
struct Totals {
    length: u64,
    bytes: Vec<(MapKind, u64)>,
}

struct Visitor {
    listing: Listing,
    lists: bool,
    grids: Option<Grids>,
    totals: Vec<Totals>,
}

impl MapVisitor for Visitor {
    fn block(&mut self, block: &RamBlock) {
        self.totals.push(Totals { length: block.length, bytes: Vec::new() });
        if self.lists {
            self.listing.block(block);
        }
        if let Some(grids) = &mut self.grids {
            grids.block(block);
        }
        self.listing.page_size = block.page_size.bytes();
    }

    fn run(&mut self, run: &MapRun<'_>) {
        if let Some(totals) = self.totals.last_mut() {
            let size = self.listing.page_size;
            let bytes = (run.range.end.0 * size).min(totals.length) - run.range.start.0 * size;
            match totals.bytes.iter_mut().find(|(kind, _)| *kind == run.kind) {
                Some((_, sum)) => *sum += bytes,
                None => totals.bytes.push((run.kind, bytes)),
            }
        }
        if self.lists {
            self.listing.run(run);
        }
        if let Some(grids) = &mut self.grids {
            grids.run(run);
        }
    }
}

/// Ranges as they come: nothing is kept of them but the last.
struct Listing {
    out: Lines,
    as_json: bool,
    head: String,
    joiner: Joiner,
    page_size: u64,
    block: Option<String>,
    has_blocks: bool,
    has_ranges: bool,
}

impl Listing {
    fn new(args: &Map, first: &MappedImage, second: Option<&MappedImage>) -> Listing {
        let head = match second {
            None => format!("{{\n  \"format\": \"{}\",\n  \"blocks\": [", first.format().name()),
            Some(second) => format!(
                "{{\n  \"formats\": [\"{}\", \"{}\"],\n  \"blocks\": [",
                first.format().name(),
                second.format().name()
            ),
        };
        Listing {
            out: Lines::new(),
            as_json: args.json,
            head,
            joiner: Joiner::default(),
            page_size: 0,
            block: None,
            has_blocks: false,
            has_ranges: false,
        }
    }

    fn block(&mut self, block: &RamBlock) {
        if let Some(range) = self.joiner.block(block) {
            self.range(&range);
        }
        if self.as_json {
            let separator = if self.has_blocks { "\n      ]\n    }," } else { self.head.as_str() };
            let name = json!(block.name);
            let head = format!(
                "{separator}\n    {{\n      \"name\": {name},\n      \"ram_bytes\": {},\n      \"page_size\": {},\n      \"ranges\": [",
                block.length,
                block.page_size.bytes()
            );
            self.out.add(head);
        } else {
            self.out.line(format!(
                "{}{}: {}",
                if self.has_blocks { "\n" } else { "" },
                block.name,
                size(block.length)
            ));
            self.out
                .line(format!("  {:>14} {:>14}  {:<8} {:>14}", "offset", "length", "kind", "file offset"));
        }
        self.block = Some(block.name.clone());
        (self.has_blocks, self.has_ranges) = (true, false);
    }

    fn run(&mut self, run: &MapRun<'_>) {
        if let Some(range) = self.joiner.run(run) {
            self.range(&range);
        }
    }

    fn range(&mut self, range: &MapRange) {
        let MapRange { offset, bytes, kind, place } = range;
        if self.as_json {
            let separator = if self.has_ranges { "," } else { "" };
            let place = match place {
                Some(place) => {
                    format!(", \"file_offset\": {}, \"file_stride\": {}", place.offset, place.stride)
                }
                None => String::new(),
            };
            let kind = kind.name();
            self.out.add(format!(
                "{separator}\n        {{ \"offset\": {offset}, \"bytes\": {bytes}, \"kind\": \"{kind}\"{place} }}"
            ));
        } else {
            let place = place.map(|place| format!("{:#x}", place.offset)).unwrap_or_default();
            let line = format!(
                "  {:>14} {:>14}  {:<8} {place:>14}",
                format!("{offset:#x}"),
                format!("{bytes:#x}"),
                kind.name()
            );
            self.out.line(line.trim_end());
        }
        self.has_ranges = true;
    }

    fn finish(&mut self, totals: &[Totals]) {
        if let Some(range) = self.joiner.finish() {
            self.range(&range);
        }
        let sum = |kind: MapKind| -> u64 {
            let of_kind = totals.iter().flat_map(|totals| &totals.bytes).filter(|(known, _)| *known == kind);
            of_kind.map(|(_, bytes)| bytes).sum()
        };
        let sums: Vec<(MapKind, u64)> = picture::KINDS
            .into_iter()
            .map(|kind| (kind, sum(kind)))
            .filter(|(_, bytes)| *bytes > 0)
            .collect();
        if self.as_json {
            let end = if self.has_blocks { "\n      ]\n    }\n  ]" } else { "]" };
            let head = if self.has_blocks { "" } else { self.head.as_str() };
            let keys: String =
                sums.iter().map(|(kind, bytes)| format!(",\n  \"{}_bytes\": {bytes}", kind.name())).collect();
            let text = format!("{head}{end}{keys}\n}}");
            self.out.line(text);
        } else {
            let parts: Vec<String> =
                sums.iter().map(|(kind, bytes)| format!("{} {}", size(*bytes), kind.name())).collect();
            self.out.line(format!("\nin all: {}", parts.join(", ")));
        }
    }
}
