// A proxy as Go programs write it, EdgeMesh's way to a local endpoint among them: one goroutine and io.Copy for each
// direction, which splices between TCP sockets. usage: copy LISTEN TARGET
package main

import (
	"io"
	"log"
	"net"
	"os"
)

func oneWay(to, from *net.TCPConn, done chan<- struct{}) {
	io.Copy(to, from)
	to.CloseWrite()
	done <- struct{}{}
}

func relay(client *net.TCPConn, target string) {
	defer client.Close()
	conn, err := net.Dial("tcp", target)
	if err != nil {
		log.Print(err)
		return
	}
	server := conn.(*net.TCPConn)
	defer server.Close()
	done := make(chan struct{}, 2)
	go oneWay(server, client, done)
	go oneWay(client, server, done)
	<-done
	<-done
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: copy LISTEN TARGET")
	}
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go relay(conn.(*net.TCPConn), os.Args[2])
	}
}
