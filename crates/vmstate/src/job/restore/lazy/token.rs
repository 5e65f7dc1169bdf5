//! What a lazy restore leaves in QEMU while it lasts: which image the guest's memory comes from, so that after a
//! vmstate that was killed no other image is taken up by mistake.
//!
//! It is an object of type `secret`, as the note of a save is, and for the same reasons (`qemu/note.rs`).

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::qemu::Session;
use crate::qmp::Client;
use crate::source::MappedRamFile;
use crate::{Error, Kind, Result};

/// The id of the object.
const ID: &str = "vmstate-lazy";

/// What is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Token {
    /// Of the image: [`fingerprint`].
    image: String,
    /// The capabilities that were on before.
    pub(super) on: Vec<String>,
}

impl Token {
    /// The token of an image, for a QEMU as it is now.
    ///
    /// # Errors
    /// As every QMP command; as [`MappedRamFile::read`].
    pub(super) fn of(image: &MappedRamFile, session: &mut Session) -> Result<Token> {
        let on = session.client.capabilities()?.into_iter().filter(|c| c.state).map(|c| c.name);
        Ok(Token { image: fingerprint(image)?, on: on.collect() })
    }

    /// Leaves it in QEMU, in place of any other.
    ///
    /// # Errors
    /// As every QMP command.
    pub(super) fn leave(&self, client: &mut Client) -> Result<()> {
        Token::remove(client)?;
        let data = serde_json::to_string(self)
            .map_err(|error| Error::new(Kind::Misuse, "a token cannot be written").because(error))?;
        client.execute("object-add", json!({ "qom-type": "secret", "id": ID, "data": data })).map(drop)
    }

    /// The token in a QEMU; `None` where there is none that can be read.
    ///
    /// # Errors
    /// As every QMP command, refusals excepted.
    pub(super) fn find(client: &mut Client) -> Result<Option<Token>> {
        match client.qom_string(&format!("/objects/{ID}"), "data") {
            Ok(data) => Ok(serde_json::from_str(&data).ok()),
            Err(error) if error.is_refusal() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes it; it is no error if there is none.
    ///
    /// # Errors
    /// As every QMP command, refusals excepted.
    pub(super) fn remove(client: &mut Client) -> Result<()> {
        match client.execute("object-del", json!({ "id": ID })) {
            Err(error) if !error.is_refusal() => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether it is of this image.
    ///
    /// # Errors
    /// As [`MappedRamFile::read`].
    pub(super) fn is_of(&self, image: &MappedRamFile) -> Result<bool> {
        Ok(self.image == fingerprint(image)?)
    }
}

/// A number that two images share only if they hold the same moment of the same guest: of the device state, with its
/// clocks and registers, and of which pages there are. FNV-1a, which no version of Rust changes; nobody who could
/// choose its input gains by a collision.
fn fingerprint(image: &MappedRamFile) -> Result<String> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    let layout = image.layout();
    add(&image.read(layout.device_state)?);
    for block in &layout.blocks {
        add(block.name.as_bytes());
        add(&block.used_length.to_be_bytes());
        image.runs(block, |run| add(&(run.start.0 ^ run.end.0.rotate_left(32)).to_be_bytes()))?;
    }
    Ok(format!("{hash:016x}"))
}
