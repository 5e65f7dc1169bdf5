#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vmstate::codec::fuzz::decompress(data));
