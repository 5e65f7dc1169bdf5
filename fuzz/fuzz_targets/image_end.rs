#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| vmstate::source::fuzz::image_end(data));
