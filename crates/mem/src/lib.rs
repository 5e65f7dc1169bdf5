//! Where guest memory lives: peer processes, presence, zero scan.
