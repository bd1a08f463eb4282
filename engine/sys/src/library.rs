//! Native libraries that are opened at run time; a missing one is an error value, never a link error.

use std::sync::Arc;

/// Why a native library or one of its symbols cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{library} is unavailable: {reason}")]
pub struct Unavailable {
    /// File name as given to the loader.
    pub library: String,
    /// The loader's text.
    pub reason: String,
}

/// A library that stays loaded as long as a clone of this value lives.
#[derive(Clone, Debug)]
pub struct Library {
    name: Arc<str>,
    handle: Arc<libloading::Library>,
}

impl Library {
    /// Opens the first of `names` that the loader finds.
    ///
    /// # Errors
    /// [`Unavailable`] naming the first library and the loader's text for each.
    ///
    /// # Safety
    /// Initialisers of the library run; the caller vouches that the named libraries may be loaded into this process.
    pub unsafe fn open(names: &[&str]) -> Result<Self, Unavailable> {
        let mut reasons = Vec::new();
        for name in names {
            // SAFETY: the caller vouches for the library.
            match unsafe { libloading::Library::new(*name) } {
                Ok(handle) => return Ok(Library { name: Arc::from(*name), handle: Arc::new(handle) }),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        let library = names.first().copied().unwrap_or_default().to_owned();
        Err(Unavailable { library, reason: reasons.join("; ") })
    }

    /// Name under which it was found.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads a symbol as `T`, a function pointer or a data pointer. It must not outlive this library.
    ///
    /// # Errors
    /// [`Unavailable`] when the library has no such symbol.
    ///
    /// # Safety
    /// `T` is the true type of the symbol, as documented by the library.
    pub unsafe fn symbol<T: Copy>(&self, name: &str) -> Result<T, Unavailable> {
        // SAFETY: the caller vouches for the type.
        let symbol = unsafe { self.handle.get::<T>(name.as_bytes()) };
        symbol.map(|s| *s).map_err(|e| Unavailable { library: self.name.to_string(), reason: e.to_string() })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn missing_library_names_itself() {
        // SAFETY: no such library exists, so nothing is loaded.
        let result = unsafe { Library::open(&["libtidewire-no-such-thing.so.9"]) };
        assert_eq!(result.map(|_| ()).map_err(|e| e.library), Err("libtidewire-no-such-thing.so.9".to_owned()));
    }

    #[test]
    fn symbols_of_the_c_library_resolve_and_unknown_ones_do_not() {
        // SAFETY: the C library is loaded already.
        let library = unsafe { Library::open(&["libc.so.6"]) }.unwrap();
        // SAFETY: `getpid(2)` takes nothing and returns an int.
        let getpid = unsafe { library.symbol::<unsafe extern "C" fn() -> i32>("getpid") };
        // SAFETY: as above.
        assert_eq!(getpid.map(|f| unsafe { f() } as u32), Ok(std::process::id()));
        // SAFETY: never called.
        assert!(unsafe { library.symbol::<unsafe extern "C" fn()>("no_such_symbol_here") }.is_err());
    }
}
