//! A communicator whose library may hang, and its end within a bounded time.

use crate::{Error, Result};
use std::cell::RefCell;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A communicator of a transport library. Both ways to end it consume it, so that each has one end.
pub(super) trait Communicator: Send + Sized + 'static {
    /// The library's name, for errors.
    const ENGINE: &'static str;

    /// Whether all work that was started has been done.
    fn is_done(&self) -> Result<bool>;

    /// An error that the library has found since the last call, of a peer for example.
    fn check(&self) -> Result<()>;

    /// Frees the communicator after its work. May hang.
    fn destroy(self);

    /// Gives up work under way and frees the communicator. May hang.
    fn abort(self);
}

/// A communicator until its first failure. That, or dropping this, ends it.
///
/// It ends on a thread of its own. If that thread is not done within the timeout, it is left behind
/// with the communicator.
#[derive(Debug)]
pub(super) struct Guarded<C: Communicator> {
    alive: RefCell<Option<C>>,
    rank: usize,
    timeout: Duration,
}

impl<C: Communicator> Guarded<C> {
    pub fn new(communicator: C, rank: usize, timeout: Duration) -> Self {
        Self { alive: RefCell::new(Some(communicator)), rank, timeout }
    }

    /// Calls the library. After an error the communicator is aborted, which takes up to the
    /// timeout.
    ///
    /// # Errors
    /// [`Error::Disconnected`] after an earlier failure; those of `call`.
    pub fn call<T>(&self, call: impl FnOnce(&C) -> Result<T>) -> Result<T> {
        let answer = match &*self.alive.borrow() {
            Some(communicator) => call(communicator),
            None => return Err(Error::Disconnected { rank: self.rank }),
        };
        if answer.is_err() {
            self.end(C::abort);
        }
        answer
    }

    /// Waits until `done`, up to the timeout.
    ///
    /// # Errors
    /// As [`call`](Self::call); those of `done` and of the communicator; [`Error::Transport`] after
    /// the timeout.
    pub fn wait(&self, done: impl Fn(&C) -> Result<bool>) -> Result<()> {
        self.call(|communicator| {
            let start = Instant::now();
            while !done(communicator)? {
                communicator.check()?;
                if start.elapsed() >= self.timeout {
                    let reason = format!("not done within {} s", self.timeout.as_secs_f64());
                    return Err(Error::Transport { engine: C::ENGINE, operation: "wait", reason });
                }
                std::thread::yield_now();
            }
            Ok(())
        })
    }

    /// Ends the communicator, unless it has ended already.
    fn end(&self, end: fn(C)) {
        let Some(communicator) = self.alive.take() else { return };
        let (ended, wait) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("{} teardown", C::ENGINE)).spawn(move || {
            end(communicator);
            // Nobody listens after the timeout.
            let _ = ended.send(());
        });
        // Without a thread the communicator is left as it is: it may hang this one.
        if thread.is_ok() {
            let _ = wait.recv_timeout(self.timeout);
        }
    }
}

/// Waits for work that was started, up to the timeout, unless this thread panics: then peers should
/// learn of it at once.
impl<C: Communicator> Drop for Guarded<C> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.end(C::abort);
        } else if self.wait(C::is_done).is_ok() {
            self.end(C::destroy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    /// How a library behaves, and what was asked of it.
    #[derive(Clone, Default)]
    struct Library {
        /// When its work is done; never if `None`.
        done_at: Option<Instant>,
        peer_failed: bool,
        ends: Ends,
        /// How often it was asked for its work.
        polls: Arc<AtomicUsize>,
        calls: Arc<Mutex<Vec<&'static str>>>,
    }

    #[derive(Clone, Copy, Default)]
    enum Ends {
        #[default]
        AtOnce,
        Never,
        Panicking,
    }

    impl Library {
        fn end(&self, call: &'static str) {
            self.calls.lock().unwrap().push(call);
            match self.ends {
                Ends::AtOnce => {}
                Ends::Never => loop {
                    std::thread::park();
                },
                Ends::Panicking => panic!("in the library"),
            }
        }

        fn guarded(&self) -> Guarded<Library> {
            Guarded::new(self.clone(), 3, TIMEOUT)
        }

        fn calls(&self) -> Vec<&'static str> {
            self.calls.lock().unwrap().clone()
        }
    }

    impl Communicator for Library {
        const ENGINE: &'static str = "library";

        fn is_done(&self) -> Result<bool> {
            self.polls.fetch_add(1, Ordering::SeqCst);
            Ok(self.done_at.is_some_and(|at| at <= Instant::now()))
        }

        fn check(&self) -> Result<()> {
            if self.peer_failed {
                let reason = "a peer has failed".into();
                return Err(Error::Transport { engine: Self::ENGINE, operation: "check", reason });
            }
            Ok(())
        }

        fn destroy(self) {
            self.end("destroy");
        }

        fn abort(self) {
            self.end("abort");
        }
    }

    const TIMEOUT: Duration = Duration::from_secs(1);

    fn idle() -> Library {
        Library { done_at: Some(Instant::now()), ..Library::default() }
    }

    #[test]
    fn an_idle_communicator_is_destroyed_once() {
        let library = idle();
        let guarded = library.guarded();
        guarded.wait(Library::is_done).unwrap();
        assert!(library.calls().is_empty());
        drop(guarded);
        assert_eq!(library.calls(), ["destroy"]);
    }

    #[test]
    fn a_drop_waits_for_work_that_was_started() {
        let done = Instant::now() + TIMEOUT / 4;
        let library = Library { done_at: Some(done), ..Library::default() };
        drop(library.guarded());
        assert!(Instant::now() >= done);
        assert_eq!(library.calls(), ["destroy"]);
    }

    #[test]
    fn work_that_never_ends_is_aborted() {
        let library = Library::default();
        let guarded = library.guarded();
        let error = guarded.wait(Library::is_done).unwrap_err();
        assert!(matches!(error, Error::Transport { engine: "library", operation: "wait", .. }), "{error}");
        assert_eq!(library.calls(), ["abort"]);
        assert!(matches!(guarded.wait(Library::is_done), Err(Error::Disconnected { rank: 3 })));
        drop(guarded);
        assert_eq!(library.calls(), ["abort"], "and not destroyed");

        let unattended = Library::default();
        drop(unattended.guarded());
        assert_eq!(unattended.calls(), ["abort"]);
    }

    #[test]
    fn errors_abort() {
        let library = Library { peer_failed: true, ..Library::default() };
        let guarded = library.guarded();
        let error = guarded.wait(Library::is_done).unwrap_err();
        assert!(matches!(error, Error::Transport { operation: "check", .. }), "{error}");
        assert_eq!(library.calls(), ["abort"]);

        let library = idle();
        let guarded = library.guarded();
        let refused = guarded.call(|_| Err::<(), _>(Error::value("buffer", "memory", "none")));
        assert!(matches!(refused, Err(Error::Value { argument: "buffer", .. })));
        assert!(matches!(guarded.call(|_| Ok(())), Err(Error::Disconnected { rank: 3 })));
        drop(guarded);
        assert_eq!(library.calls(), ["abort"]);
    }

    /// With a library that hangs each of these would hang as well.
    #[test]
    fn an_end_that_hangs_is_given_up() {
        let library = Library { ends: Ends::Never, ..idle() };
        drop(library.guarded());
        assert_eq!(library.calls(), ["destroy"]);

        let library = Library { ends: Ends::Never, ..Library::default() };
        let guarded = library.guarded();
        guarded.wait(Library::is_done).unwrap_err();
        assert_eq!(library.calls(), ["abort"]);
        drop(guarded);
        assert_eq!(library.calls(), ["abort"], "not again");
    }

    #[test]
    fn an_end_that_panics_ends() {
        let library = Library { ends: Ends::Panicking, ..idle() };
        drop(library.guarded());
        assert_eq!(library.calls(), ["destroy"]);
    }

    #[test]
    fn a_panicking_thread_aborts_and_waits_for_no_work() {
        let library = Library { ends: Ends::Never, ..Library::default() };
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _guarded = Guarded::new(library.clone(), 0, TIMEOUT);
            panic!("with work under way");
        }));
        assert!(panicked.is_err());
        assert_eq!(library.polls.load(Ordering::SeqCst), 0);
        assert_eq!(library.calls(), ["abort"]);
    }
}
