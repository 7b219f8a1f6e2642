/* LD_PRELOAD: what of a directory tree would survive a loss of power.
 *
 * Below $FP_SHADOW_ROOT every fsync of a file keeps its bytes, and every fsync of a directory its entries, in $FP_SHADOW_DIR; nothing
 * else survives. A link there keeps the inode, so that its number is not given to another file while its bytes count.
 *
 *   f.<inode>  the file's bytes at its last fsync     d.<inode>  "<inode> <d|f> <name>" a line
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int below(int fd, const char *root) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    size_t length = strlen(root);
    return strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int real_sync(const char *name, int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

static void put(const char *temporary, const char *path, int out) {
    close(out);
    rename(temporary, path);
}

static void keep_file(int fd, const char *shadow, struct stat *about) {
    char path[4096], temporary[4160], link[64], buffer[65536];
    snprintf(path, sizeof path, "%s/pin.%lu", shadow, (unsigned long)about->st_ino);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    linkat(AT_FDCWD, link, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
    int in = open(link, O_RDONLY | O_CLOEXEC); /* the descriptor itself may be for writing alone */
    snprintf(path, sizeof path, "%s/f.%lu", shadow, (unsigned long)about->st_ino);
    snprintf(temporary, sizeof temporary, "%s.%d.%d.tmp", path, (int)getpid(), fd);
    int out = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (in < 0 || out < 0) abort();
    off_t at = 0;
    ssize_t got;
    while ((got = pread(in, buffer, sizeof buffer, at)) > 0) {
        if (write(out, buffer, got) != got) abort();
        at += got;
    }
    close(in);
    put(temporary, path, out);
}

static void keep_directory(int fd, const char *shadow, struct stat *about) {
    char path[4096], temporary[4160], link[64], line[4200];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    snprintf(path, sizeof path, "%s/d.%lu", shadow, (unsigned long)about->st_ino);
    snprintf(temporary, sizeof temporary, "%s.%d.%d.tmp", path, (int)getpid(), fd);
    int out = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    DIR *directory = opendir(link);
    if (out < 0 || !directory) abort();
    struct dirent *entry;
    while ((entry = readdir(directory))) {
        struct stat one;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        if (fstatat(dirfd(directory), entry->d_name, &one, AT_SYMLINK_NOFOLLOW)) continue;
        int size = snprintf(line, sizeof line, "%lu %c %s\n", (unsigned long)one.st_ino, S_ISDIR(one.st_mode) ? 'd' : 'f', entry->d_name);
        if (write(out, line, size) != size) abort();
    }
    closedir(directory);
    put(temporary, path, out);
}

static int kept(const char *name, int fd) {
    int result = real_sync(name, fd), before = errno;
    const char *root = getenv("FP_SHADOW_ROOT"), *shadow = getenv("FP_SHADOW_DIR");
    struct stat about;
    if (result == 0 && root && shadow && below(fd, root) && fstat(fd, &about) == 0) {
        if (S_ISDIR(about.st_mode)) keep_directory(fd, shadow, &about);
        else if (S_ISREG(about.st_mode)) keep_file(fd, shadow, &about);
    }
    errno = before;
    return result;
}

int fsync(int fd) { return kept("fsync", fd); }
int fdatasync(int fd) { return kept("fdatasync", fd); }
