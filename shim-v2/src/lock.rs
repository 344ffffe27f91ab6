//! The one way in which the shim takes a mutex of the standard library.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock that outlives a panic: what it guards is changed in single steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
