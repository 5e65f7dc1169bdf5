//! `vmstate map`.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::Path;

use serde_json::json;
use vmstate::job::{
    Joiner, MapKind, MapRange, MapRun, MapSettings, MapVisitor, MappedImage, map, map_changes,
};
use vmstate::page::RamBlock;
use vmstate::{Error, Kind};

use super::Outcome;
use crate::args::Map;
use crate::output::{Lines, size};
use crate::picture::{self, Caption, Grids};

/// Shows where guest memory is in an image, or what changed from one image to another.
pub fn run(args: &Map) -> vmstate::Result<Outcome> {
    for picture in [&args.svg, &args.png].into_iter().flatten() {
        refuse_existing(picture, args.overwrite)?;
    }
    let first = MappedImage::open(&args.image, args.offset)?;
    let second = match &args.other {
        Some(path) => Some(MappedImage::open(path, 0)?),
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

/// Says beforehand what would be said when all of the image was read.
fn refuse_existing(path: &Path, overwrite: bool) -> vmstate::Result<()> {
    if path.exists() && !overwrite { Err(exists(path)) } else { Ok(()) }
}

fn write(path: &Path, bytes: &[u8], overwrite: bool) -> vmstate::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).truncate(true);
    let options = if overwrite { options.create(true) } else { options.create_new(true) };
    let written = options.open(path).and_then(|mut file| file.write_all(bytes));
    written.map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => exists(path),
        _ => Error::io(format!("cannot write {}", path.display()), error),
    })
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
