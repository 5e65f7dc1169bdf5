//! Something that happens at one moment of a job, every time the same.

use std::sync::Mutex;

use vmstate::Observer;

/// An observer that does one thing when a phase begins, on the job's own thread: the job waits for it. It
/// remembers what it was told.
pub struct Hook<'a> {
    phase: &'static str,
    act: Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>,
    phases: Mutex<Vec<&'static str>>,
    warnings: Mutex<Vec<String>>,
}

impl<'a> Hook<'a> {
    /// Does `act` at the beginning of the first phase of that name.
    pub fn at(phase: &'static str, act: impl FnOnce() + Send + 'a) -> Hook<'a> {
        Hook {
            phase,
            act: Mutex::new(Some(Box::new(act))),
            phases: Mutex::default(),
            warnings: Mutex::default(),
        }
    }

    /// The phases that have begun.
    ///
    /// # Panics
    /// When the hook's own act had panicked.
    pub fn phases(&self) -> Vec<&'static str> {
        self.phases.lock().expect("no panic before").clone()
    }

    /// What the user was warned of.
    ///
    /// # Panics
    /// When the hook's own act had panicked.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.lock().expect("no panic before").clone()
    }

    /// Whether the moment has come.
    ///
    /// # Panics
    /// When the hook's own act had panicked.
    pub fn is_done(&self) -> bool {
        self.act.lock().expect("no panic before").is_none()
    }
}

impl Observer for Hook<'_> {
    fn phase(&self, name: &'static str) {
        self.phases.lock().expect("no panic before").push(name);
        if name == self.phase {
            let act = self.act.lock().expect("no panic before").take();
            if let Some(act) = act {
                act();
            }
        }
    }

    fn warn(&self, text: &str) {
        self.warnings.lock().expect("no panic before").push(text.to_owned());
    }
}
