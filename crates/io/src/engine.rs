//! What lanes move bytes with: a ring that has many requests under way, or a thread that waits for each.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::OnceLock;

use crate::ring::Ring;

/// The variable of the environment that [`EngineChoice::Auto`] looks at.
pub const ENGINE_VARIABLE: &str = "VMSTATE_IO";

/// What lanes are to move bytes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// What the environment's `VMSTATE_IO` says, if it says anything; else io_uring where the kernel lets us.
    #[default]
    Auto,
    /// io_uring; an error where the kernel does not let us.
    IoUring,
    /// A thread that waits for each of its requests.
    Threads,
}

/// What lanes move bytes with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    IoUring {
        /// Whether a lane that gets no ring of its own is an error, and not a lane that waits.
        is_demanded: bool,
    },
    /// A thread that waits for each of its requests.
    Threads {
        /// Why not io_uring, in words for the user.
        reason: String,
    },
}

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<EngineChoice, String> {
        match text {
            "auto" | "" => Ok(EngineChoice::Auto),
            "io_uring" => Ok(EngineChoice::IoUring),
            "threads" => Ok(EngineChoice::Threads),
            _ => Err(format!("`{text}` is none of `auto`, `io_uring` and `threads`")),
        }
    }
}

impl EngineChoice {
    /// Finds the engine. The kernel is asked once in the life of the process.
    ///
    /// # Errors
    /// `InvalidInput` where the environment names no engine; what the kernel said where io_uring was demanded.
    pub fn engine(self) -> io::Result<Engine> {
        self.engine_where(std::env::var(ENGINE_VARIABLE).ok().as_deref(), refusal)
    }

    fn engine_where(
        self,
        environment: Option<&str>,
        refusal: impl Fn() -> Option<&'static io::Error>,
    ) -> io::Result<Engine> {
        let told = match (self, environment) {
            (EngineChoice::Auto, Some(text)) => text.parse().map_err(|problem| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("{ENGINE_VARIABLE}: {problem}"))
            })?,
            (choice, _) => choice,
        };
        match (told, refusal()) {
            (EngineChoice::Threads, _) => Ok(Engine::Threads { reason: "switched off".to_owned() }),
            (EngineChoice::Auto, None) => Ok(Engine::IoUring { is_demanded: false }),
            (EngineChoice::IoUring, None) => Ok(Engine::IoUring { is_demanded: true }),
            (EngineChoice::Auto, Some(error)) => {
                Ok(Engine::Threads { reason: format!("the kernel refuses io_uring: {error}") })
            }
            (EngineChoice::IoUring, Some(error)) => {
                Err(io::Error::new(error.kind(), format!("the kernel refuses io_uring: {error}")))
            }
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Engine::IoUring { .. } => write!(f, "io_uring"),
            Engine::Threads { reason } => write!(f, "threads ({reason})"),
        }
    }
}

/// Why the kernel gives us no ring: seccomp, `kernel.io_uring_disabled`, or its age. Asked once.
fn refusal() -> Option<&'static io::Error> {
    static REFUSAL: OnceLock<Option<io::Error>> = OnceLock::new();
    REFUSAL.get_or_init(|| Ring::<()>::open(1).err()).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_has_a_say_where_nobody_else_has() {
        use EngineChoice::{Auto, IoUring, Threads};
        let forbidden: &'static io::Error = Box::leak(Box::new(io::Error::from_raw_os_error(libc::EPERM)));
        let off = Ok("threads (switched off)");
        let refused = "the kernel refuses io_uring: Operation not permitted (os error 1)";
        let fallen = format!("threads ({refused})");
        for (choice, environment, is_forbidden, expected) in [
            (Auto, None, false, Ok("io_uring")),
            (Auto, Some(""), false, Ok("io_uring")),
            (Auto, Some("auto"), false, Ok("io_uring")),
            (Auto, Some("threads"), false, off),
            (Auto, Some("io_uring"), false, Ok("io_uring")),
            (Auto, Some("aio"), false, Err("VMSTATE_IO: `aio` is none of `auto`, `io_uring` and `threads`")),
            (IoUring, Some("threads"), false, Ok("io_uring")),
            (Threads, Some("io_uring"), false, off),
            (Auto, None, true, Ok(fallen.as_str())),
            (Auto, Some("io_uring"), true, Err(refused)),
            (IoUring, None, true, Err(refused)),
            (Threads, None, true, off),
        ] {
            let found = choice.engine_where(environment, || is_forbidden.then_some(forbidden));
            let found = found.map(|engine| engine.to_string()).map_err(|error| error.to_string());
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(found, expected, "{choice:?} {environment:?} {is_forbidden}");
        }
    }
}
