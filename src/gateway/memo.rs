//! What is kept in memory, up to a bound, by a digest of what it is about; another may take its place at any time.
//!
//! Underneath all of these are one type of moka's cache: each further type of it is some 40 KB of machine code.

use moka::sync::Cache;
use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

pub(super) type Name = [u8; 32];

pub(super) struct Memo<V> {
    values: Cache<Name, Weighed>,
    kind: PhantomData<fn() -> V>,
}

#[derive(Clone)]
struct Weighed {
    weight: u32,
    value: Arc<dyn Any + Send + Sync>,
}

impl<V: Any + Send + Sync> Memo<V> {
    /// `capacity`: of all that is kept, by its weight.
    pub(super) fn new(capacity: u64) -> Self {
        let values = Cache::builder().max_capacity(capacity).weigher(|_, weighed: &Weighed| weighed.weight).build();
        Self { values, kind: PhantomData }
    }

    pub(super) fn get(&self, name: &Name) -> Option<Arc<V>> {
        self.values.get(name)?.value.downcast().ok()
    }

    pub(super) fn insert(&self, name: Name, weight: usize, value: V) {
        self.values.insert(name, weighed(weight, Arc::new(value)));
    }
}

#[cfg(test)]
impl<V> Memo<V> {
    /// How many are kept, and what they weigh.
    pub(super) fn held(&self) -> (u64, u64) {
        self.values.run_pending_tasks();
        (self.values.entry_count(), self.values.weighted_size())
    }
}

impl<V: Any + Send + Sync + Default> Memo<V> {
    /// The one that all get who ask for it at once. It weighs 1.
    pub(super) fn get_or_default(&self, name: Name) -> Arc<V> {
        let value = self.values.get(&name).unwrap_or_else(|| put(&self.values, name, weighed(1, Arc::<V>::default())));
        value.value.downcast().unwrap_or_default()
    }
}

fn weighed(weight: usize, value: Arc<dyn Any + Send + Sync>) -> Weighed {
    Weighed { weight: u32::try_from(weight).unwrap_or(u32::MAX), value }
}

/// Unless there is one by now.
fn put(values: &Cache<Name, Weighed>, name: Name, value: Weighed) -> Weighed {
    values.get_with(name, || value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn all_get_the_same_one() {
        let memo = Memo::<AtomicU32>::new(100);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..50_u8 {
                        memo.get_or_default([n; 32]).fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert!((0..50_u8).all(|n| memo.get(&[n; 32]).unwrap().load(Ordering::Relaxed) == 4));
    }

    #[test]
    fn what_weighs_too_much_is_not_kept() {
        let memo = Memo::<&str>::new(100);
        (0..10).for_each(|n| memo.insert([n; 32], 40, "heavy"));
        memo.insert([10; 32], 101, "too heavy");
        assert_eq!(memo.held(), (2, 80));
        assert_eq!(memo.get(&[10; 32]), None);
    }
}
