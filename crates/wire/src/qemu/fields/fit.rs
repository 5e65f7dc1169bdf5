//! Makes the description of another section of the same kind fit a payload.

use crate::qemu::format::QEMU_VM_SUBSECTION;
use crate::qemu::vmdesc::{Description, Device, Field};
use crate::{Fault, cursor::Cursor};

use super::{DEPTH_MAX, FieldDecoder};

impl FieldDecoder {
    /// The description of `payload`, made from one of a section with the same name and version.
    ///
    /// What differs between two sections of one kind are their subsections, which a device writes where it has a
    /// reason to: those that `template` has and `payload` has not are dropped, and the sizes of structs follow. Fields
    /// that come and go with a version or a property, and lists, cannot be told from the payload: a template that
    /// differs in those does not fit, which shows where its fields do not end with the payload.
    ///
    /// # Errors
    /// Damaged: the payload, which starts at the absolute offset `base`, is not what the template describes.
    /// Unsupported: more fields than the limits allow; they count as values.
    pub fn fit(&mut self, template: &Device, payload: &[u8], base: u64) -> Result<Device, Fault> {
        let mut walk = Walk { cursor: Cursor::new(payload, base), decoder: self };
        let name = template.vmsd_name.as_deref().unwrap_or_default();
        let (fields, subsections) = walk.content(name, &template.fields, &template.subsections, 0)?;
        if walk.cursor.remaining() > 0 {
            let problem = format!("{} bytes are left behind what is described", walk.cursor.remaining());
            return Err(Fault::damaged(walk.cursor.position(), "payload", problem));
        }
        Ok(Device {
            name: template.name.clone(),
            instance_id: template.instance_id,
            size: template.size,
            vmsd_name: template.vmsd_name.clone(),
            version: template.version,
            fields,
            subsections,
        })
    }
}

struct Walk<'a, 'b> {
    cursor: Cursor<'a>,
    decoder: &'b mut FieldDecoder,
}

impl Walk<'_, '_> {
    fn content(
        &mut self,
        vmsd_name: &str,
        fields: &[Field],
        subsections: &[Description],
        depth: u32,
    ) -> Result<(Vec<Field>, Vec<Description>), Fault> {
        if depth > DEPTH_MAX {
            let problem = format!("structs are nested more than {DEPTH_MAX} deep");
            return Err(Fault::unsupported(self.cursor.position(), "vmdescription", problem));
        }
        let mut fitted = Vec::new();
        for field in fields {
            self.decoder.spend(1, self.cursor.position())?;
            fitted.push(self.field(field, depth)?);
        }
        let mut present = Vec::new();
        let mut candidates = subsections.iter();
        while let Some(name) = next_subsection(&self.cursor, vmsd_name) {
            self.decoder.spend(1, self.cursor.position())?;
            // They stand in the order of the schema.
            let Some(found) = candidates.find(|candidate| candidate.vmsd_name.as_bytes() == name) else {
                let field = format!("subsection `{}`", String::from_utf8_lossy(name).escape_debug());
                return Err(Fault::damaged(self.cursor.position(), field, "is not described"));
            };
            let head = 2 + name.len();
            let read =
                self.cursor.bytes(head, "subsection").and_then(|_| self.cursor.be32("subsection version"));
            read.map_err(|error| error.at_end())?;
            present.push(self.description(found, depth + 1)?);
        }
        Ok((fitted, present))
    }

    fn description(&mut self, part: &Description, depth: u32) -> Result<Description, Fault> {
        let (fields, subsections) = self.content(&part.vmsd_name, &part.fields, &part.subsections, depth)?;
        Ok(Description { vmsd_name: part.vmsd_name.clone(), version: part.version, fields, subsections })
    }

    fn field(&mut self, field: &Field, depth: u32) -> Result<Field, Fault> {
        // QEMU lists the elements of an array one by one where they may differ, as those with subsections do.
        if let (Some(structure), None) = (&field.structure, field.array_len) {
            let start = self.cursor.position();
            let inner = self.description(structure, depth + 1)?;
            let size = self.cursor.position() - start;
            return Ok(Field {
                name: field.name.clone(),
                kind: field.kind.clone(),
                index: field.index,
                structure: Some(Box::new(inner)),
                size,
                ..Field::default()
            });
        }
        let len = field.size.checked_mul(field.array_len.unwrap_or(1));
        let taken = len.and_then(|len| usize::try_from(len).ok());
        if taken.and_then(|len| self.cursor.bytes(len, "field").ok()).is_none() {
            let problem = "has more bytes than the section has left";
            return Err(Fault::damaged(self.cursor.position(), format!("field `{}`", field.name), problem));
        }
        Ok(field.clone())
    }
}

/// The name of the subsection that stands here, if one of `vmsd_name` does: QEMU knows it by the same signs.
fn next_subsection<'a>(cursor: &Cursor<'a>, vmsd_name: &str) -> Option<&'a [u8]> {
    let (&kind, rest) = cursor.rest().split_first()?;
    let (&len, rest) = rest.split_first()?;
    let name = rest.get(..usize::from(len))?;
    (kind == QEMU_VM_SUBSECTION && name.len() > vmsd_name.len() && name.starts_with(vmsd_name.as_bytes()))
        .then_some(name)
}
