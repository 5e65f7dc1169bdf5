//! Writing calls.

use super::decode::Domain;
use super::format::{
    Header, MessageKind, PROTOCOL_VERSION, Procedure, Status, VIR_NET_MESSAGE_HEADER_MAX,
    VIR_NET_MESSAGE_LEN_MAX, VIR_TYPED_PARAM_INT, VIR_TYPED_PARAM_STRING,
};
use crate::cursor::Encoder;

/// The arguments of a call, appended one after the other.
#[derive(Clone, Debug, Default)]
pub struct Arguments(Vec<u8>);

impl Arguments {
    /// None yet.
    pub fn new() -> Arguments {
        Arguments::default()
    }

    /// The bytes so far.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A word.
    pub fn word(mut self, value: u32) -> Arguments {
        Encoder::new(&mut self.0).be32(value);
        self
    }

    /// A text.
    ///
    /// # Panics
    /// When it is 4 GiB long.
    pub fn string(self, text: &str) -> Arguments {
        let len = u32::try_from(text.len()).expect("a text of an argument is short");
        let mut with = self.word(len);
        with.0.extend_from_slice(text.as_bytes());
        // Every item begins at a multiple of four.
        with.0.resize(with.0.len().next_multiple_of(4), 0);
        with
    }

    /// A text that may be absent.
    pub fn optional_string(self, text: Option<&str>) -> Arguments {
        match text {
            Some(text) => self.word(1).string(text),
            None => self.word(0),
        }
    }

    /// A parameter that has a name and is a number.
    pub fn number_parameter(self, name: &str, value: u32) -> Arguments {
        self.string(name).word(VIR_TYPED_PARAM_INT).word(value)
    }

    /// A parameter that has a name and is a text.
    pub fn text_parameter(self, name: &str, value: &str) -> Arguments {
        self.string(name).word(VIR_TYPED_PARAM_STRING).string(value)
    }

    /// Bytes whose number both sides know, a multiple of four.
    pub fn opaque<const N: usize>(mut self, bytes: &[u8; N]) -> Arguments {
        const { assert!(N.is_multiple_of(4)) };
        self.0.extend_from_slice(bytes);
        self
    }

    /// A domain.
    pub fn domain(self, domain: &Domain) -> Arguments {
        self.string(&domain.name).opaque(&domain.uuid).word(domain.id.cast_unsigned())
    }
}

/// A call as it goes over the connection, with so many descriptors behind it. Each follows by itself, with a byte of
/// its own, when the whole message has gone.
///
/// # Panics
/// When the arguments are 4 GiB long.
pub fn encode_call(procedure: Procedure, serial: u32, arguments: &Arguments, descriptors: u32) -> Vec<u8> {
    let words = if descriptors == 0 { 0 } else { 4 };
    let len = VIR_NET_MESSAGE_LEN_MAX + VIR_NET_MESSAGE_HEADER_MAX + words + arguments.0.len();
    let mut out = Vec::with_capacity(len);
    Encoder::new(&mut out).be32(u32::try_from(len).expect("arguments are short"));
    let kind = if descriptors == 0 { MessageKind::Call } else { MessageKind::CallWithFds };
    let (program, version) = (procedure.program(), PROTOCOL_VERSION);
    Header { program, version, procedure: procedure.number(), kind, serial, status: Status::Ok }
        .encode(&mut out);
    if descriptors > 0 {
        Encoder::new(&mut out).be32(descriptors);
    }
    out.extend_from_slice(&arguments.0);
    out
}
