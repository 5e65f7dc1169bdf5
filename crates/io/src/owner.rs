//! Whose a new file is to be.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::str::FromStr;

/// What a lookup of a name may need at most; real entries have some hundred bytes, large groups more.
const ENTRY_LEN_MAX: usize = 1 << 20;

/// The user and the group that a file is given to; what is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user's number.
    pub user: Option<u32>,
    /// The group's number.
    pub group: Option<u32>,
}

/// Why a text names no owner.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// Nothing stands on either side of the colon.
    #[error("USER, USER:GROUP or :GROUP is wanted")]
    Empty,
    /// The system knows no user of that name.
    #[error("there is no user `{0}`")]
    NoUser(String),
    /// The system knows no group of that name.
    #[error("there is no group `{0}`")]
    NoGroup(String),
    /// The system could not be asked.
    #[error("cannot look up `{name}`")]
    Lookup {
        /// The name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

impl FromStr for Owner {
    type Err = OwnerError;

    /// Reads `USER`, `USER:GROUP` or `:GROUP`, each a name or a number. As for chown(1), a name that is known
    /// counts before the number that it looks like.
    fn from_str(text: &str) -> Result<Owner, OwnerError> {
        let (user, group) = text.split_once(':').unwrap_or((text, ""));
        if user.is_empty() && group.is_empty() {
            return Err(OwnerError::Empty);
        }
        let named =
            |name: &str, look_up: fn(&str) -> io::Result<Option<u32>>, none: fn(String) -> OwnerError| {
                if name.is_empty() {
                    return Ok(None);
                }
                let found = look_up(name)
                    .map_err(|source| OwnerError::Lookup { name: name.to_owned(), source })?
                    // The greatest number means "leave it" to chown(2).
                    .or_else(|| name.parse().ok().filter(|number| *number != u32::MAX));
                found.map(Some).ok_or_else(|| none(name.to_owned()))
            };
        Ok(Owner {
            user: named(user, user_number, OwnerError::NoUser)?,
            group: named(group, group_number, OwnerError::NoGroup)?,
        })
    }
}

fn user_number(name: &str) -> io::Result<Option<u32>> {
    look_up(name, |name, buffer| {
        let mut entry = MaybeUninit::<libc::passwd>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: the name ends in a zero byte, the buffer is exclusively ours with the length given, and both
        // results are written to variables of this frame.
        let code = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                &mut found,
            )
        };
        let number = || {
            // SAFETY: the call succeeded and `found` is not null, so the entry was filled in.
            let entry = unsafe { entry.assume_init_ref() };
            entry.pw_uid
        };
        (code, (code == 0 && !found.is_null()).then(number))
    })
}

fn group_number(name: &str) -> io::Result<Option<u32>> {
    look_up(name, |name, buffer| {
        let mut entry = MaybeUninit::<libc::group>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: the name ends in a zero byte, the buffer is exclusively ours with the length given, and both
        // results are written to variables of this frame.
        let code = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                entry.as_mut_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                &mut found,
            )
        };
        let number = || {
            // SAFETY: the call succeeded and `found` is not null, so the entry was filled in.
            let entry = unsafe { entry.assume_init_ref() };
            entry.gr_gid
        };
        (code, (code == 0 && !found.is_null()).then(number))
    })
}

/// Asks with buffers of growing length, and again after a signal.
fn look_up(
    name: &str,
    mut ask: impl FnMut(&CString, &mut [u8]) -> (i32, Option<u32>),
) -> io::Result<Option<u32>> {
    let Ok(name) = CString::new(name) else { return Ok(None) };
    let mut buffer = vec![0; 4096];
    loop {
        match ask(&name, &mut buffer) {
            (0, number) => return Ok(number),
            (libc::EINTR, _) => {}
            (libc::ERANGE, _) if buffer.len() < ENTRY_LEN_MAX => buffer.resize(buffer.len() * 4, 0),
            // What getpwnam(3) lists for a name that is not there.
            (libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM, _) => return Ok(None),
            (code, _) => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_names_or_numbers() {
        for (text, user, group) in [
            ("root", Some(0), None),
            ("root:root", Some(0), Some(0)),
            ("1234", Some(1234), None),
            ("1234:5678", Some(1234), Some(5678)),
            (":5678", None, Some(5678)),
            ("root:", Some(0), None),
        ] {
            let found: Owner = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(found, Owner { user, group }, "{text}");
        }
    }

    #[test]
    fn what_names_nobody_is_refused_with_the_part_that_does_not() {
        for (text, expected) in [
            ("", "USER, USER:GROUP or :GROUP is wanted"),
            (":", "USER, USER:GROUP or :GROUP is wanted"),
            ("no-such-user-here", "there is no user `no-such-user-here`"),
            ("root:no-such-group", "there is no group `no-such-group`"),
            ("4294967295", "there is no user `4294967295`"),
            ("-1", "there is no user `-1`"),
            ("root:a\0b", "there is no group `a\0b`"),
        ] {
            let error = text.parse::<Owner>().expect_err(text);
            assert_eq!(error.to_string(), expected);
        }
    }
}
