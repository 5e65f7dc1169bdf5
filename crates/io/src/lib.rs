//! How bytes move: lanes, aligned buffers, durable publish.
