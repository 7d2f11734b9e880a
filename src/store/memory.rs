//! A store in memory: nothing survives the process. For tests, and for those who accept that.
