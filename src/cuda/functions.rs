//! Handles of loaded kernels, shared by all threads of the process.

use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock};

/// Handles of kernels by context and name. Each is loaded once and never dropped: a graph may
/// launch its kernel at any time later.
#[derive(Debug)]
pub(super) struct Functions<H> {
    loaded: RwLock<HashMap<(usize, &'static str), H>>,
    /// Held while kernels are loaded, so that launches of others go on.
    loading: Mutex<()>,
}

impl<H> Default for Functions<H> {
    fn default() -> Self {
        Self { loaded: RwLock::default(), loading: Mutex::default() }
    }
}

impl<H: Clone> Functions<H> {
    /// The handle of a kernel. The first call for it in a context runs `load`, which returns the
    /// handles of all kernels of its module; threads that come meanwhile wait for that.
    ///
    /// # Errors
    /// Those of `load`, after which the next call loads again; [`Error::Value`] if `kernel` is not
    /// among what it returns.
    pub fn get(
        &self,
        context: usize,
        kernel: &str,
        load: impl FnOnce() -> Result<Vec<(&'static str, H)>>,
    ) -> Result<H> {
        if let Some(handle) = self.find(context, kernel) {
            return Ok(handle);
        }
        let _loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have loaded it while this one waited.
        if let Some(handle) = self.find(context, kernel) {
            return Ok(handle);
        }
        let handles = load()?.into_iter().map(|(name, handle)| ((context, name), handle));
        self.loaded.write().unwrap_or_else(PoisonError::into_inner).extend(handles);
        self.find(context, kernel).ok_or_else(|| {
            Error::value("kernel", "one that was built (see STAR_ATTENTION_HEAD_DIMS)", kernel)
        })
    }

    fn find(&self, context: usize, kernel: &str) -> Option<H> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).get(&(context, kernel)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier};
    use std::time::Duration;

    const MODULES: [[&str; 2]; 2] = [["encode_f16", "encode_bf16"], ["merge_f32", "merge_f16"]];

    /// What a driver would load, counted.
    #[derive(Default)]
    struct Loader {
        loads: [AtomicUsize; MODULES.len()],
        unloads: Arc<AtomicUsize>,
    }

    /// A module, unloaded when its last handle is dropped.
    #[derive(Debug)]
    struct Module(Arc<AtomicUsize>);

    impl Drop for Module {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Loader {
        fn load(&self, kernel: &str) -> Result<Vec<(&'static str, Arc<Module>)>> {
            let Some(at) = MODULES.iter().position(|names| names.contains(&kernel)) else {
                return Ok(Vec::new());
            };
            self.loads[at].fetch_add(1, Ordering::SeqCst);
            // Long enough for all threads to find nothing loaded.
            std::thread::sleep(Duration::from_millis(20));
            let module = Arc::new(Module(self.unloads.clone()));
            Ok(MODULES[at].iter().map(|&name| (name, module.clone())).collect())
        }

        fn counts(&self) -> [usize; 3] {
            [&self.loads[0], &self.loads[1], &*self.unloads].map(|count| count.load(Ordering::SeqCst))
        }
    }

    #[test]
    fn many_threads_load_each_module_once_and_share_its_handles() {
        let (functions, loader, start) = (Functions::default(), Loader::default(), Barrier::new(32));
        let handles: Vec<(usize, Arc<Module>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..32)
                .map(|thread| {
                    let (functions, loader, start) = (&functions, &loader, &start);
                    scope.spawn(move || {
                        let (module, kernel) = (thread % 2, MODULES[thread % 2][thread / 2 % 2]);
                        start.wait();
                        (module, functions.get(7, kernel, || loader.load(kernel)).unwrap())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(loader.counts(), [1, 1, 0]);
        let first = |module| &handles.iter().find(|(of, _)| *of == module).unwrap().1;
        assert!(handles.iter().all(|(module, handle)| Arc::ptr_eq(handle, first(*module))));
        drop(handles);
        assert_eq!(loader.counts(), [1, 1, 0], "what was loaded stays");
    }

    #[test]
    fn contexts_have_handles_of_their_own() {
        let (functions, loader) = (Functions::default(), Loader::default());
        let get = |context| functions.get(context, "merge_f16", || loader.load("merge_f16")).unwrap();
        assert!(!Arc::ptr_eq(&get(1), &get(2)));
        assert!(Arc::ptr_eq(&get(1), &get(1)));
        assert_eq!(loader.counts(), [0, 2, 0]);
    }

    #[test]
    fn a_load_that_fails_is_tried_again() {
        let (functions, loader) = (Functions::default(), Loader::default());
        let failed = functions.get(1, "merge_f32", || Err(Error::value("device", "memory", "none")));
        assert!(matches!(failed, Err(Error::Value { argument: "device", .. })));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            functions.get(1, "merge_f32", || panic!("in the loader"))
        }));
        assert!(panicked.is_err());
        functions.get(1, "merge_f32", || loader.load("merge_f32")).unwrap();
        assert_eq!(loader.counts(), [0, 1, 0]);
    }

    #[test]
    fn a_kernel_of_no_module_is_an_error() {
        let (functions, loader) = (Functions::default(), Loader::default());
        let error = functions.get(1, "decode", || loader.load("decode")).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "kernel", .. }), "{error}");
    }
}
