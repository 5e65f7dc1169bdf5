# The built-in guest: a boot sector, and one more, that owns the machine's RAM and keeps writing a known pattern
# into it.
#
# Assembled by `as --64` and `ld -Ttext 0x7c00 --oformat binary` into guest.bin, which is committed;
# a test of this crate assembles it again and compares.
#
# What it does
#   It enters long mode, maps the first 64 GiB one to one with pages of 2 MiB, and owns
#     - low RAM from 2 MiB to 2 MiB below its end (the firmware keeps its tables there), and
#     - all RAM from 4 GiB on, up to 64 GiB,
#   each range cut short by a parameter. Round r = 1, 2, 3 … visits every owned page, range by range, in steps of
#   a parameter, which is 1: in ascending order:
#     - the first and the last word (64 bits) must hold `index | (r - 1) << 40`, where index is the
#       guest-physical address >> 12; in round 1 nothing is checked;
#     - then it writes `index | r << 40` to the first word, with `r <= fill_rounds` a sequence seeded by
#       that word to the 510 words between, and the same word again at the end of the page.
#
# What it says on COM1, each on a line, numbers as 8 hexadecimal digits
#   P  how many pages it owns, once at the start
#   R  the round just finished
#   E  the index of a page that did not hold what it had written; then it halts
#
# Where things are
#   0x07c00  the two sectors; the stack grows down from here
#   0x10000  PML4, 0x11000 PDPT, 0x12000..0x52000 one page directory per GiB

        .set    PML4, 0x10000
        .set    PDPT, 0x11000
        .set    DIRECTORIES, 0x12000
        .set    MAPPED_GIB, 64
        # Present, writable, and already accessed and dirty, so that no walk has to set the bits later.
        .set    TABLE, 0x63
        .set    LARGE, 0xe3
        .set    COM1, 0x3f8

        .globl  _start
        .text
        .code16
_start:
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    %ax, %es
        movw    $_start, %sp

        # The firmware loaded the first sector and left the number of its drive in %dl; head 0, sector 2 follows.
        movw    $0x0201, %ax
        movw    $0x0002, %cx
        movb    $0, %dh
        movw    $second, %bx
        int     $0x13
        jc      stuck

        # The tables are zeroed and just enough of them filled in to map the first 2 MiB, where this code and
        # the tables lie; the rest is easier to write from long mode.
        movw    $(PML4 >> 4), %dx
        movw    %dx, %es
        xorl    %eax, %eax
        xorl    %edi, %edi
        movw    $0x4000, %cx
        rep stosl
        movl    $(PDPT | TABLE), %es:0
        movl    $(DIRECTORIES | TABLE), %es:(PDPT - PML4)
        movb    $LARGE, %es:(DIRECTORIES - PML4)

        # Long mode, straight from real mode: PAE, the tables, EFER.LME, then protection and paging at once.
        movl    $0x20, %eax
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx
        rdmsr
        orb     $1, %ah
        wrmsr
        lgdtl   gdt
        movl    %cr0, %eax
        orl     $0x80000001, %eax
        movl    %eax, %cr0
        ljmpw   $8, $long_mode

stuck:  hlt
        jmp     stuck

        .code64
long_mode:
        movl    $DIRECTORIES, %edi
        movl    $LARGE, %eax
        movl    $(MAPPED_GIB * 512), %ecx
1:      stosq
        addq    $0x200000, %rax
        loop    1b
        movl    $PDPT, %edi
        movl    $(DIRECTORIES | TABLE), %eax
        movl    $MAPPED_GIB, %ecx
1:      stosq
        addl    $0x1000, %eax
        loop    1b

        # Low RAM: CMOS 0x34-0x35 count units of 64 KiB beyond 16 MiB. The owned pages begin at 2 MiB.
        movb    $0x35, %al
        movb    $2, %cl
        call    cmos
        leal    (0x1000 - 2 * 0x200)(%rbx), %esi
        cmpl    pages_low_max, %esi
        cmoval  pages_low_max, %esi
        leal    0x200(%rsi), %r8d
        # High RAM: CMOS 0x5b-0x5d count units of 64 KiB beyond 4 GiB.
        movb    $0x5d, %al
        movb    $3, %cl
        call    cmos
        cmpl    pages_high_max, %ebx
        cmoval  pages_high_max, %ebx
        movl    $((MAPPED_GIB - 4) << 18), %ecx
        cmpl    %ecx, %ebx
        cmoval  %ecx, %ebx
        leal    0x100000(%rbx), %r9d

        leal    (%rsi, %rbx), %edx
        movb    $'P', %al
        call    say

        # %ebp is the round; %r12 and %r13 are what a round adds to a word and what the fill multiplies by.
        xorl    %ebp, %ebp
        movl    $1, %r12d
        shlq    $40, %r12
        movabsq $6364136223846793005, %r13

round:  incl    %ebp
        movl    $0x200, %ebx
        movl    %r8d, %esi
        call    sweep
        movl    $0x100000, %ebx
        movl    %r9d, %esi
        call    sweep
        movl    %ebp, %edx
        movb    $'R', %al
        call    say

        cmpl    halt_after_round, %ebp
        je      halt
        # The timer's interrupt, at the rate the firmware left (18.2 Hz), is let in only while waiting. One
        # that fell due during the round ends the first wait at once.
        movl    pause_ticks, %ecx
        jrcxz   round
        lidt    idtr
        movb    $0xfe, %al
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
1:      sti
        hlt
        cli
        loop    1b
        jmp     round

# Parameters: the lab writes them into its copy of the image, at these offsets.
        .org    _start + 0x1e8
pages_low_max:          .long   0xffffffff
pages_high_max:         .long   0xffffffff
halt_after_round:       .long   0
fill_rounds:            .long   0
pause_ticks:            .long   0
        .org    _start + 510
        .word   0xaa55

second:
# Visits the pages %ebx..%esi. From the first it goes on by `stride` pages, modulo the power of two that holds them
# all, leaving out what lies beyond the end, until it is back at the first. An odd stride comes by all of them.
sweep:  subl    %ebx, %esi
        jbe     6f
        movl    %ebx, %r10d
        leal    -1(%rsi), %ecx
        orl     $1, %ecx
        bsrl    %ecx, %ecx
        movl    $2, %r11d
        shll    %cl, %r11d
        decl    %r11d
        xorl    %r15d, %r15d
1:      cmpl    %esi, %r15d
        jae     5f
        leal    (%r10, %r15), %ebx
        movq    %rbx, %rdi
        shlq    $12, %rdi
        leal    -1(%rbp), %eax
        shlq    $40, %rax
        orq     %rbx, %rax
        cmpl    $1, %ebp
        je      2f
        cmpq    (%rdi), %rax
        jne     bad
        cmpq    0xff8(%rdi), %rax
        jne     bad
2:      addq    %r12, %rax
        leaq    0xff8(%rdi), %r14
        movq    %rax, (%rdi)
        cmpl    fill_rounds, %ebp
        ja      4f
        movq    %rax, %rdx
        movl    $510, %ecx
3:      addq    $8, %rdi
        imulq   %r13, %rdx
        incq    %rdx
        movq    %rdx, (%rdi)
        loop    3b
4:      movq    %rax, (%r14)
5:      addl    stride, %r15d
        andl    %r11d, %r15d
        jnz     1b
6:      ret

bad:    movl    %ebx, %edx
        movb    $'E', %al
        call    say
halt:   cli
        hlt
        jmp     halt

# Reads %ecx CMOS registers, the highest of them %al, into %ebx.
cmos:   xorl    %ebx, %ebx
1:      movb    %al, %dl
        outb    %al, $0x70
        inb     $0x71, %al
        shll    $8, %ebx
        movb    %al, %bl
        movb    %dl, %al
        decl    %eax
        loop    1b
        # A unit of 64 KiB is 16 pages.
        shll    $4, %ebx
        ret

# Prints the letter in %al, %edx as 8 hexadecimal digits and a newline.
say:    movl    $8, %ecx
        call    put
1:      roll    $4, %edx
        movb    %dl, %al
        andb    $0xf, %al
        # The classic: 0x0..0x9 become '0'..'9', 0xa..0xf become 'a'..'f'.
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     2f
        addb    $('a' - '9' - 1), %al
2:      call    put
        loop    1b
        movb    $10, %al
# Sends %al; a machine without a COM1 reads as always ready.
put:    pushq   %rdx
        pushq   %rax
        movl    $(COM1 + 5), %edx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        popq    %rax
        movb    $(COM1 & 0xff), %dl
        outb    %al, %dx
        popq    %rdx
        ret

# The timer's interrupt only has to be acknowledged.
tick:   pushq   %rax
        movb    $0x20, %al
        outb    %al, $0x20
        popq    %rax
        iretq

# The null descriptor is never read, so it holds the pointer to the table it belongs to.
        .balign 2
gdt:    .word   gdt_end - gdt - 1
        .long   gdt
        .word   0
        .quad   0x00209a0000000000
gdt_end:

# One interrupt gate, at the vector that the firmware gave the timer: 8.
        .set    IDT, gate - 8 * 16
idtr:   .word   8 * 16 + 15
        .quad   IDT
gate:   .word   tick, 8, 0x8e00, 0
        .quad   0

# One more parameter.
        .org    _start + 0x3fc
stride:                 .long   1
        .org    _start + 1024
